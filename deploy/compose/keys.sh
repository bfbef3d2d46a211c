#!/bin/sh
# Make three identities and the endpoint's key in keys/, and pin the certificates in session.yaml.
# For one machine: real parties run keygen each at home, and exchange their certificates.
set -eu
cd "$(dirname "$0")"
mkdir -m 700 -p keys
for rank in 0 1 2; do
    mpcache-party keygen --rank "$rank" --out keys
done
mpcache-party pin --config session.yaml keys/server.crt keys/client.crt keys/dealer.crt
(umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > keys/api.key)
echo "keys/api.key: what callers of the endpoint present"
