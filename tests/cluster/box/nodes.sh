#!/bin/bash
# Hosts in a box: network + hostname + mount namespaces "login", "node1", "node2", ... (10.88.0.254, .1, .2, ...), one cable each to a bridge in "login".
# They share the file system, except /etc/hosts, /etc/hostname, /dev/shm and /run/sshd.
#   [NODES="login node1 node2 node3"] nodes.sh up (adds those that are missing) | down | on NODE COMMAND... | cut NODE | plug NODE
# Debian: iproute2, util-linux (both there already). Needs root.
set -euo pipefail
BOX=${BOX:-/run/crossbatch-box}
CB=${CB:-cb}  # begins the names of network namespaces
NODES=${NODES:-login node1 node2}
address() { case $1 in login) echo 10.88.0.254;; *) echo 10.88.0.${1#node};; esac; }
on() { local node=$1; shift; exec nsenter --net=/run/netns/$CB-$node --uts=$BOX/uts-$node --mount=$BOX/mnt-$node --wdns="$PWD" -- "$@"; }
up() {
    mkdir -p $BOX; mountpoint -q $BOX || { mount -t tmpfs tmpfs $BOX; mount --make-private $BOX; }
    { echo "127.0.0.1 localhost"; for node in $NODES; do echo "$(address $node) $node"; done; } > $BOX/hosts
    for node in $NODES; do
        [ -e /run/netns/$CB-$node ] && continue
        ip netns add $CB-$node
        ip -n $CB-$node link set lo up
        touch $BOX/uts-$node $BOX/mnt-$node; echo $node > $BOX/hostname-$node
        unshare --uts=$BOX/uts-$node hostname $node
        unshare --mount=$BOX/mnt-$node --propagation private bash -c "
            mount --bind $BOX/hosts /etc/hosts; mount --bind $BOX/hostname-$node /etc/hostname
            mount -t tmpfs tmpfs /dev/shm; mkdir -p /run/sshd; mount -t tmpfs -o mode=755 tmpfs /run/sshd"
    done
    if ! ip -n $CB-login link show bridge >/dev/null 2>&1; then
        ip -n $CB-login link add bridge type bridge
        ip -n $CB-login address add $(address login)/24 dev bridge
        ip -n $CB-login link set bridge up
    fi
    for node in ${NODES//login/}; do
        ip -n $CB-login link show to-$node >/dev/null 2>&1 && continue
        ip link add eth0 netns $CB-$node type veth peer name to-$node netns $CB-login
        ip -n $CB-login link set to-$node master bridge up
        ip -n $CB-$node address add $(address $node)/24 dev eth0
        ip -n $CB-$node link set eth0 up
    done
}
down() {  # first end what runs there
    for node in $NODES; do
        for pid in $(ip netns pids $CB-$node); do kill -9 $pid || true; done
        ip netns del $CB-$node || true
        umount $BOX/uts-$node $BOX/mnt-$node || true
    done
    umount $BOX && rmdir $BOX
}
case $1 in
    up) up;; down) down;; on) shift; on "$@";;
    cut) ip -n $CB-$2 link set eth0 down;; plug) ip -n $CB-$2 link set eth0 up;;
esac
