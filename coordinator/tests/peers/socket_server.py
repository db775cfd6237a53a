"""A validator's websocket as python-socketio serves it, for the interoperability test of our client.

Takes one JSON object on the command line: port (0: a free one), interval and timeout of pings in seconds,
refuse (authentications to refuse first), cert and key for TLS. Prints one JSON object a line for all that
happens; reads one JSON object a line with what to do: emit, disconnect.
"""

import asyncio
import json
import sys

import socketio
from aiohttp import web
from substrateinterface import Keypair

settings = json.loads(sys.argv[1])
server = socketio.AsyncServer(
    async_mode="aiohttp",
    cors_allowed_origins="*",
    ping_interval=settings["interval"],
    ping_timeout=settings["timeout"],
)
refuse = settings["refuse"]


def tell(**what):
    print(json.dumps(what), flush=True)


@server.event
async def connect(sid, environ):
    # As the real server: no third argument, so an auth object would break it.
    tell(happened="connect", transport=environ.get("QUERY_STRING"))


@server.event
async def disconnect(sid, reason=None):
    tell(happened="disconnect")


@server.event
async def authenticate(sid, data):
    global refuse
    hotkey, nonce, signature = (data["X-Chutes-" + name] for name in ("Hotkey", "Nonce", "Signature"))
    good = Keypair(ss58_address=hotkey).verify(f"{hotkey}:{nonce}:sockets", bytes.fromhex(signature))
    if good and refuse == 0:
        await server.emit("auth_success", {"message": "Authenticated"}, to=sid)
        tell(happened="authenticated", hotkey=hotkey)
        return True
    refuse -= 1
    await server.emit("auth_failed", {"error": "Authentication failed: refused"}, to=sid)
    await server.disconnect(sid)
    tell(happened="refused", good=good)


async def obey():
    reader = asyncio.StreamReader(limit=16 * 1024 * 1024)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        order = json.loads(line)
        if "emit" in order:
            await server.emit("miner_broadcast", order["emit"])
        if "disconnect" in order:
            for sid in list(server.manager.get_participants("/", None)):
                await server.disconnect(sid[0])


async def main():
    app = web.Application()
    server.attach(app)
    runner = web.AppRunner(app)
    await runner.setup()
    tls = None
    if settings.get("cert"):
        import ssl

        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(settings["cert"], settings["key"])
    site = web.TCPSite(runner, "127.0.0.1", settings["port"], ssl_context=tls, reuse_address=True)
    await site.start()
    tell(happened="listening", port=site._server.sockets[0].getsockname()[1])
    await obey()


asyncio.run(main())
