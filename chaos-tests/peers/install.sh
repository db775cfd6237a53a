#!/bin/sh
# Installs the Python peers of the interoperability tests into target/peers (or the folder given as the first
# argument). Does nothing when that folder already holds the pinned versions. The last line printed is the folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-${CHUTES_PEERS:-$root/target/peers}}
stamp="$folder/requirements.installed"
if ! cmp -s "$here/requirements.txt" "$stamp"; then
    python3 -m venv "$folder" >&2
    "$folder/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$stamp"
fi
echo "$folder"
