#!/usr/bin/env bash
# Installs what the tests need and pip does not bring: a browser for the pages, a PostgreSQL server for the queue.
set -euo pipefail
missing=()
command -v chromium >/dev/null || missing+=(chromium fonts-dejavu-core fonts-noto-color-emoji)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
[ ${#missing[@]} -eq 0 ] && exit
if ! command -v apt-get >/dev/null; then
    echo "the tests need Debian's packages ${missing[*]}, or their like; apt-get is not there to install them" >&2
    exit 1
fi
sudo=$([ "$(id -u)" -eq 0 ] || echo sudo)
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
