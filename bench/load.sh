#!/usr/bin/env bash
# A load run of the real binary over loopback: prints the numbers of docs/performance.md.
# For rates the server has one core and the load another; memory is as it comes.
# Takes some five minutes; needs wrk, redis-server (apt-get install wrk redis-server)
# and two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
go build -trimpath -ldflags "-s -w" -o "$dir/wxscan" .
go build -o "$dir/load" bench/load.go
ulimit -n "$(ulimit -Hn)"
floor=127.0.0.1:7101 server=127.0.0.1:7102 # bare net/http, and wxscan

start() { # ADDR [pinned]: sets PID
  if [ "$1" = $floor ]; then set -- "${2:-}" "$dir/load" floor "$1"; else
    set -- "${2:-}" "$dir/wxscan" -demo -addr "$1" -ttl 1h -max-tickets 2000000 -qr-rate 0 -log-level error
  fi
  if [ -n "$1" ]; then GOMAXPROCS=1 taskset -c 0 "${@:2}" 2>/dev/null & else "${@:2}" 2>/dev/null & fi
  pid=$!
  sleep 0.5
}
stop() { kill "$pid"; wait "$pid" 2>/dev/null || true; }
ticket() { curl -s "$server/wechat/getauthqr" | sed 's/.*"ticket":"\([^"]*\)".*/\1/'; }
cpu() { awk '{print $14 + $15}' "/proc/$1/stat"; } # in hundredths of a second
rss() { awk '/VmRSS/ {print $2}' "/proc/$1/status"; } # kB
load() { taskset -c 1 "$dir/load" "$@"; }
ratio() { awk "BEGIN {printf \"%.2f\", $1 / $2}"; }
median() { sort -n | awk '{a[NR] = $1} END {print a[int((NR + 1) / 2)]}'; }
polls() { # PID URL: polls per second of the server's CPU
  local before requests
  before=$(cpu "$1")
  requests=$(taskset -c 1 wrk -t1 -c32 -d1s "$2" | awk '/requests in/ {print $1}')
  echo $((requests * 100 / ($(cpu "$1") - before)))
}

echo "$(nproc) cores: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1); $(go version | cut -d' ' -f3)"
start $floor pinned; base=$pid
for n in 1 1000 10000 100000 1000000; do
  start $server; before=$(rss "$pid")
  load tickets $n http://$server
  each=$((($(rss "$pid") - before) * 1024 / n)); stop # as it comes, on both cores
  start $server pinned
  load tickets $n http://$server
  T=$(ticket)
  for _ in 1 2 3 4 5 6 7; do # interleaved, as others disturb
    polls "$base" "http://$floor/wechat/checklogin?ticket=$T" >>"$dir/floor$n"
    polls "$pid" "http://$server/wechat/checklogin?ticket=$T" >>"$dir/polls$n"
  done
  least=$(median <"$dir/floor$n") many=$(median <"$dir/polls$n")
  echo "poll, $n tickets: $many per CPU-second, floor $least, $(ratio "$many" "$least")"
  [ $n -lt 10000 ] || echo "pending ticket among $n: $each bytes of RSS" # of fewer, the heap's least size would drown it
  stop
done
pid=$base; stop

start $server pinned
echo "push: $(load push 20000 "$pid" http://$server) per CPU-second"
echo "getauthqr and its picture: $(load qr 200 "$pid" http://$server) ms of CPU"
echo "scan to browser: $(load scan 300 http://$server) ms (median, 99th percentile)"
stop
for n in 1000 5000 10000; do
  for addr in $floor $server; do
    start $addr pinned
    before=$(rss "$pid")
    mkfifo "$dir/hold"
    load park $n http://$addr <"$dir/hold" >"$dir/parked" &
    exec 9>"$dir/hold"
    until grep -q parked "$dir/parked"; do sleep 0.2; done
    each=$((($(rss "$pid") - before) * 1024 / n))
    if [ $addr = $floor ]; then least=$each; else
      used=$(cpu "$pid"); sleep 5; used=$(($(cpu "$pid") - used))
      echo "parked poll, $n wait: $each bytes, floor $least, $(ratio $each $least); $(ratio $used 5) % of a core"
      [ $n != 10000 ] || echo "scan to browser, then: $(load scan 300 http://$server) ms"
    fi
    exec 9>&-
    rm "$dir/hold"
    stop
  done
done
for _ in 1 2 3 4 5 6 7; do load first 127.0.0.1:7103 "$dir/wxscan" -demo -addr 127.0.0.1:7103 2>/dev/null; done | median |
  sed 's/.*/exec to first answer: & ms/'

# The same server with memory and with Redis; a demo of its own plays WeChat.
simulator=127.0.0.1:7104 redis=7105
"$dir/wxscan" -demo -addr $simulator -qr-rate 0 -log-level error >/dev/null 2>&1 &
redis-server --port $redis --save '' --dir "$dir" >/dev/null &
sleep 1
export WECHAT_APPID=wx0123456789abcdef WECHAT_APPSECRET=simulated WECHAT_TOKEN=simulated PUBLIC_URL=http://$server
export WECHAT_API_BASE=http://$simulator/demo SESSION_SECRET=0123456789abcdef0123456789abcdef
for url in "" redis://127.0.0.1:$redis; do
  REDIS_URL=$url GOMAXPROCS=1 taskset -c 0 "$dir/wxscan" -addr $server -ttl 1h -qr-rate 0 -log-level error 2>/dev/null &
  pid=$!
  sleep 0.5
  load tickets 1000 http://$server
  T=$(ticket)
  for _ in 1 2 3; do polls "$pid" "http://$server/wechat/checklogin?ticket=$T"; done | median >"$dir/rate"
  echo "${url:-memory}: $(cat "$dir/rate") polls, $(load push 2000 "$pid" http://$server) logins by push per CPU-second"
  stop
done
unset WECHAT_APPID WECHAT_APPSECRET WECHAT_TOKEN PUBLIC_URL WECHAT_API_BASE SESSION_SECRET

start $server
echo "binary: $(stat -c %s "$dir/wxscan") bytes; idle RSS: $(rss "$pid") kB"
stop
