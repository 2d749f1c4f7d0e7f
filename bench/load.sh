#!/usr/bin/env bash
# A load run of the real binary over loopback: prints the table of "Numbers" in
# the README. The server has one core, the load another. Takes about a minute;
# needs wrk (apt-get install wrk) and two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
go build -trimpath -ldflags "-s -w" -o "$dir/wxscan" .
go build -o "$dir/load" bench/load.go
ulimit -n "$(ulimit -Hn)"

start() { # NAME PORT: wxscan or the floor, on core 0
  if [ "$1" = floor ]; then set -- "$dir/load" floor "127.0.0.1:$2"; else set -- "$dir/wxscan" -demo -addr "127.0.0.1:$2" -ttl 1h -log-level error; fi
  GOMAXPROCS=1 taskset -c 0 "$@" 2>/dev/null &
  pid=$!
  sleep 0.3
}
stop() { kill "$pid"; wait "$pid" 2>/dev/null || true; }
ticket() { curl -s "127.0.0.1:$1/wechat/getauthqr" | sed 's/.*"ticket":"\([^"]*\)".*/\1/'; }
cpu() { awk '{print $14 + $15}' "/proc/$1/stat"; } # in hundredths of a second
rss() { awk '/VmRSS/ {print $2}' "/proc/$1/status"; } # kB
load() { taskset -c 1 "$dir/load" "$@"; }
polls() { # PID URL: polls per second of the server's CPU
  local before after requests
  before=$(cpu "$1")
  requests=$(taskset -c 1 wrk -t1 -c32 -d3s "$2" | awk '/requests in/ {print $1}')
  after=$(cpu "$1")
  echo $((requests * 100 / (after - before)))
}
ratio() { awk "BEGIN {printf \"%.2f\", $1 / $2}"; }

start floor 7101; floor=$pid
start wxscan 7102; server=$pid
T=$(ticket 7102)
few=0 base=0
for _ in 1 2 3; do # interleaved, and the best of each: others disturb, nobody helps
  n=$(polls "$floor" "http://127.0.0.1:7101/wechat/checklogin?ticket=$T"); [ "$n" -le "$base" ] || base=$n
  n=$(polls "$server" "http://127.0.0.1:7102/wechat/checklogin?ticket=$T"); [ "$n" -le "$few" ] || few=$n
done
echo "poll, floor:             $base per CPU-second"
echo "poll, few tickets:       $few, $(ratio "$few" "$base") of the floor"
idle=$(rss "$server")
for n in 1000 10000 100000; do
  pid=$server; stop; start wxscan 7102; server=$pid
  before=$(rss "$server")
  load tickets $n http://127.0.0.1:7102 || exit 1
  held=$(rss "$server")
  T=$(ticket 7102) many=0
  case $T in *error*) T=x ;; esac
  for _ in 1 2; do
    m=$(polls "$server" "http://127.0.0.1:7102/wechat/checklogin?ticket=$T"); [ "$m" -le "$many" ] || many=$m
  done
  echo "poll, $n tickets:     $many, $(ratio "$many" "$base"); $(((held - before) * 1024 / n)) bytes of RSS a ticket"
done
pid=$server; stop; start wxscan 7102; server=$pid
echo "scan to browser:         $(load scan 300 http://127.0.0.1:7102) ms (median, 99th percentile)"
T=$(ticket 7102)
for n in 1000 5000 10000; do
  for name in floor wxscan; do
    [ $name = floor ] && { pid=$floor; port=7101; } || { pid=$server; port=7102; }
    stop; start $name $port; [ $name = floor ] && floor=$pid || { server=$pid; T=$(ticket 7102); }
    before=$(rss "$pid")
    mkfifo "$dir/hold"
    load park $n "http://127.0.0.1:$port/wechat/checklogin?wait=30&ticket=$T" <"$dir/hold" >"$dir/parked" &
    exec 9>"$dir/hold"
    until grep -q parked "$dir/parked"; do sleep 0.2; done
    each=$((($(rss "$pid") - before) * 1024 / n))
    [ $name = floor ] && { least=$each; } || {
      used=$(cpu "$pid"); sleep 5; used=$(($(cpu "$pid") - used))
      echo "parked poll, $n wait: $each bytes, $(ratio "$each" "$least") of the floor; $(ratio "$used" 5) % of a core"
      [ $n = 10000 ] && echo "scan to browser, then:   $(load scan 300 http://127.0.0.1:7102) ms"
    }
    exec 9>&-; rm "$dir/hold"; sleep 0.5
  done
done
pid=$server; stop; pid=$floor; stop
echo "exec to first answer:    $(load first 127.0.0.1:7103 "$dir/wxscan" -demo -addr 127.0.0.1:7103 -log-level error 2>/dev/null) ms"
echo "binary, idle RSS:        $(stat -c %s "$dir/wxscan") bytes, $idle kB"
