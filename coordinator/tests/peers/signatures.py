"""Signatures by and for other implementations: one JSON object in, one out, for each line.

{"verify": [ss58, message, hex]} -> {"substrate": bool, "bittensor": bool}
{"sign": [seed hex, message]} -> {"ss58": text, "substrate": hex, "bittensor": hex}
"""

import json
import sys

import bittensor_wallet
import substrateinterface

for line in sys.stdin:
    order = json.loads(line)
    answer = {}
    for name, library in (("substrate", substrateinterface), ("bittensor", bittensor_wallet)):
        if "verify" in order:
            address, message, signature = order["verify"]
            answer[name] = library.Keypair(ss58_address=address).verify(message, bytes.fromhex(signature))
        else:
            seed, message = order["sign"]
            pair = library.Keypair.create_from_seed(seed)
            answer[name] = pair.sign(message.encode()).hex()
            if answer.setdefault("ss58", pair.ss58_address) != pair.ss58_address:
                sys.exit("the libraries disagree about the address")
    print(json.dumps(answer), flush=True)
