#!/bin/sh
# layer.sh WORK LISTS LOWER COMMANDS: runs COMMANDS as a Dockerfile's RUN would, on top of the directories LOWER
# (overlayfs order, topmost first), and leaves what changed in WORK/upper, in overlayfs form. Started in a mount
# namespace of its own, so that nothing stays mounted however it ends.
set -eu
work=$1 lists=$2 lower=$3 commands=$4
root=$work/root
mkdir -p "$work/upper" "$work/overlay" "$root" "$work/apt/archives/partial"
mount -t overlay overlay "$root" \
  -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/overlay,index=off,metacopy=off,redirect_dir=off,volatile"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mount --bind "$lists" "$root/var/lib/apt/lists"
mount --bind "$work/apt" "$root/var/cache/apt"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

chroot "$root" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
  LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" \
  install='apt-get install -qq -y --no-install-recommends -o APT::Sandbox::User=root -o Acquire::Retries=5
    -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0' \
  /bin/sh -euc "$commands" > "$work/log" 2>&1 < /dev/null || { cat "$work/log" >&2; exit 1; }

# What differs from run to run and nobody needs.
rm -f "$root/etc/resolv.conf" "$root/usr/sbin/policy-rc.d" "$root/var/cache/ldconfig/aux-cache" \
  "$root/var/log/dpkg.log" "$root/var/log/alternatives.log" "$root"/var/log/apt/*
