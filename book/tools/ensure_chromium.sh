#!/usr/bin/env bash
# Find a Chromium for the tests of the book, or install Debian's.
set -euo pipefail

if [ -n "${CHROMIUM:-}" ] && [ -x "$CHROMIUM" ]; then
    exit 0
fi
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
    echo "Installing Chromium for the tests of the book"
    log=$(mktemp)
    if as_root apt-get update >"$log" 2>&1 &&
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends chromium >>"$log" 2>&1; then
        exit 0
    fi
    tail -n 20 "$log" >&2
fi

cat >&2 <<'MESSAGE'
The tests of the book need a browser, and none was found.
Install Chromium or Google Chrome so that one of the commands
    chromium   chromium-browser   google-chrome
exists, or set CHROMIUM to the path of the program. On Debian:
    apt-get install chromium
MESSAGE
exit 1
