#!/usr/bin/env bash
# Certificates for Ray's own TLS, where nothing else makes them (on Kubernetes cert-manager does; docs/deploying.md#tls).
# Ray checks that a node's certificate is for the address that it is called by, so every node has its own, of an authority
# that all trust. Who has ca.key can join the cluster: keep it like the token.
#
#   deploy/tls.sh authority FOLDER    once: makes FOLDER/ca.key and FOLDER/ca.crt
#   deploy/tls.sh node FOLDER HERE    on each node, before `ray start`: HERE/node.key and HERE/node.crt, HERE/ca.crt
set -euo pipefail
umask 077
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

case ${1:-} in
authority)
    [ $# -eq 2 ] || usage
    [ ! -e "$2/ca.key" ] || { echo "$2/ca.key is there already; it is not overwritten" >&2; exit 1; }
    mkdir -p "$2"
    openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj /CN=kto-ray -keyout "$2/ca.key" -out "$2/ca.crt" 2>/dev/null
    ;;
node)
    [ $# -eq 3 ] || usage
    mkdir -p "$3"
    names="DNS:localhost,DNS:$(hostname)"
    for address in 127.0.0.1 $(hostname -I); do names+=",IP:$address"; done
    openssl req -newkey rsa:3072 -nodes -subj "/CN=$(hostname)" -keyout "$3/node.key" -out "$3/node.csr" 2>/dev/null
    openssl x509 -req -in "$3/node.csr" -CA "$2/ca.crt" -CAkey "$2/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
        -days 365 -extfile <(printf 'subjectAltName=%s\n' "$names") -out "$3/node.crt" 2>/dev/null
    cp "$2/ca.crt" "$3/ca.crt"
    rm "$3/node.csr"
    ;;
*) usage ;;
esac
