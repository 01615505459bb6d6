#!/bin/sh
# base.sh TREE LISTS: unpacks Debian's minimal system into the new directory TREE and keeps apt's package lists
# in LISTS, for the layers on top. Nothing of the building machine stays in the tree.
set -eu
tree=$1 lists=$2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
mmdebstrap --mode=root --variant=minbase --format=directory \
  --aptopt='Acquire::Retries "5"' --dpkgopt='force-unsafe-io' \
  --customize-hook="mkdir -p '$lists' && cp -a \"\$1\"/var/lib/apt/lists/. '$lists'/" \
  --customize-hook='rm -f "$1/etc/resolv.conf" "$1/etc/hostname" "$1/var/cache/ldconfig/aux-cache"' \
  --customize-hook='rm -rf "$1"/usr/share/locale/?? "$1"/usr/share/locale/??_??' \
  bookworm "$tree" 2>"$log" || { cat "$log" >&2; exit 1; }

# These belong to apt's own user only if that user could reach the tree while it was made.
chown 0:0 "$tree/var/lib/apt/lists/partial" "$tree/var/cache/apt/archives/partial"
