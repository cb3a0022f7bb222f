#!/usr/bin/env bash
# MLflow on the head: only for the head (127.0.0.1:5000), behind a password that is made at the first start and kept in
# ~/.mlflow/credentials, where MLflow's own clients look for it. Where it runs already, nothing happens.
#
# bash mlflow_server.sh [ARTIFACTS]   a folder or s3:// address for artifacts; default: ~/mlflow/artifacts
set -euo pipefail
umask 077

home=$HOME/mlflow
artifacts=${1:-$home/artifacts}
credentials=$HOME/.mlflow/credentials
address=http://127.0.0.1:5000

answers() { python -c "import urllib.request as u; u.urlopen('$address/health', timeout=2)" 2>/dev/null; }

if answers; then exit 0; fi
mkdir -p "$home" "$HOME/.mlflow"
if [ ! -s "$credentials" ]; then
    printf '[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = %s\n' \
        "$(python -c 'import secrets; print(secrets.token_urlsafe(24))')" >"$credentials"
fi

cat >"$home/auth.ini" <<END
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///$home/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
export MLFLOW_AUTH_CONFIG_PATH=$home/auth.ini
MLFLOW_AUTH_ADMIN_PASSWORD=$(sed -n 's/^mlflow_tracking_password = //p' "$credentials")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(python -c 'import secrets; print(secrets.token_hex(32))')
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

# A session of its own: it must outlive the SSH connection that starts it.
setsid mlflow server --app-name basic-auth --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri "sqlite:///$home/mlflow.db" --artifacts-destination "$artifacts" \
    </dev/null >"$home/server.log" 2>&1 &
echo $! >"$home/server.pid"

for _ in $(seq 120); do
    if answers; then exit 0; fi
    sleep 1
done
tail -n 20 "$home/server.log" >&2
echo "MLflow did not start within two minutes, see $home/server.log" >&2
exit 1
