#!/usr/bin/env bash
# Builds the CPU image and tries it where there is no Docker engine: with Debian's buildah, on a
# base that debootstrap makes. Needs root, 15 GB of disk for the time, and some minutes.
#   docker/image_test.sh [FOLDER]    works in FOLDER (build/image-test), and removes it
# TORCH_INDEX: where torch's CPU build comes from; left out, from wherever pip is set up to look.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "image-test: $*" >&2
  exit 1
}
[ "$(id -u)" = 0 ] || fail "needs root, for debootstrap and chroot"
for tool in buildah debootstrap curl; do
  command -v $tool >/dev/null || fail "needs $tool: apt-get install --no-install-recommends buildah debootstrap curl"
done
work=${1:-build/image-test}
[ ! -e "$work" ] || fail "$work exists: remove it, or name another folder"
mkdir -p "$work"
work=$(realpath "$work")
clean() {
  pkill -u 10001 -f /opt/malora/bin/malora || true
  wait
  store umount --all >/dev/null 2>&1 || true
  rm -rf --one-file-system "$work"
}
trap clean EXIT
free=$(df --output=avail -BG "$work" | tail -1 | tr -dc 0-9)
[ "$free" -ge 15 ] || fail "$free GB are free for $work, 15 are needed"
store() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

echo "== base: Debian bookworm with its Python 3.11"
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
  "$work/base" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/log" 2>&1 || {
  tail "$work/log" >&2
  fail "debootstrap failed"
}
base=$(store from scratch)
store add --quiet "$base" "$work/base" / >/dev/null
store commit --quiet "$base" malora-test-base >/dev/null
store rm "$base" >/dev/null
rm -rf "$work/base"

echo "== wheels: fetched by this machine's pip, so that the build itself needs no network"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --upgrade pip
fetch() {
  "$work/venv/bin/pip" download -qq --dest "$work/wheels" --find-links "$work/wheels" \
    --only-binary=:all: --python-version 3.11 "$@"
}
mkdir "$work/wheels"
torch=$(grep '^torch==' constraints.txt)
fetch --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
fetch -c constraints.txt "$torch" hatchling '.[otel,quantization,s3]'
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"

echo "== image"
store bud --isolation chroot --format docker --quiet --file docker/Dockerfile --tag malora-test \
  --build-arg BASE_IMAGE=localhost/malora-test-base --build-arg TORCH_INDEX= \
  --volume "$work/wheels:/wheels:ro" --volume "$work/pip.conf:/etc/pip.conf:ro" . >"$work/log" 2>&1 || {
  tail -40 "$work/log" >&2
  fail "the build failed"
}
store images --format '{{.Name}} {{.Size}}' | sed 's/^/   /'
[ "$(store inspect --type image --format '{{.Docker.Config.User}}' malora-test)" = 10001 ] \
  || fail "the image runs as another user than 10001"

echo "== server: as the image's user, on a read-only file system"
container=$(store from malora-test)
root=$(store mount "$container")
port=$("$work/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
# chroot isolation knows no read-only root, so all that root's folders hold is bound read-only.
inside() {
  local mounts=() folder
  for folder in opt usr etc var; do
    mounts+=(--volume "$root/$folder:/$folder:ro")
  done
  for folder in /tmp /var/cache/malora; do
    mounts+=(--mount "type=tmpfs,dst=$folder,tmpfs-mode=1777")
  done
  store run --isolation chroot --env MALORA_PORT="$port" --env MALORA_HOST=127.0.0.1 \
    "${mounts[@]}" "$container" -- "$@"
}
for folder in /opt/malora /usr/bin /etc /var/lib; do
  store run --isolation chroot --user root --volume "$root$folder:$folder:ro" "$container" -- \
    sh -c "! touch $folder/x 2>/dev/null" || fail "$folder can be written"
done
inside malora serve --kv-cache-memory 64MiB >"$work/server.log" 2>&1 &
running=$!
answer() { curl --silent --fail --max-time 60 "http://127.0.0.1:$port$1" "${@:2}"; }
for _ in $(seq 120); do
  kill -0 $running 2>/dev/null || break
  ! answer /health >/dev/null || break
  sleep 1
done
answer /health >/dev/null || {
  cat "$work/server.log" >&2
  fail "the server does not answer"
}
inside sh -c "$(store inspect --type image malora-test \
  | "$work/venv/bin/python" -c 'import json, shlex, sys
print(shlex.join(json.load(sys.stdin)["Docker"]["config"]["Healthcheck"]["Test"][1:]))')" \
  || fail "the image's health check fails"
reply=$(answer /v1/completions --header 'Content-Type: application/json' \
  --data '{"model": "malora-base", "prompt": "The capital of France is", "max_tokens": 8, "ignore_eos": true}')
echo "   $reply"
[[ "$reply" == *'"completion_tokens":8'* ]] || fail "not eight tokens"
metrics=$(answer /metrics)
grep -q '^malora_generation_tokens_total{model_name="malora-base"} 8.0$' <<<"$metrics" \
  || fail "/metrics does not count them"
for what in /opt/malora/bin/malora malora_server.engine.process; do
  process=$(pgrep -u 10001 -f -o -- "python3 .*$what") || fail "$what does not run as user 10001"
  echo "   $what: $(grep ^Uid "/proc/$process/status" | tr '\t' ' ')"
done
pkill -TERM -u 10001 -f -- "python3 /opt/malora/bin/malora serve"
wait $running || {
  cat "$work/server.log" >&2
  fail "the server ended with status $?"
}
! grep -q Traceback "$work/server.log" || fail "a traceback in the server's log"
echo "== the image works"
