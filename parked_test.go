package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestOverACapAPollIsAnsweredAtOnce(t *testing.T) {
	other := func(i int) string { return fmt.Sprintf("10.0.%d.%d", i>>8, i&255) }
	for _, test := range []struct {
		name      string
		taken     int // places, by others
		perTicket int // polls
		forwarded func(i int) string
		want      int
	}{
		{"one ticket, from everywhere", 0, 100, other, maxParkedPerTicket},
		{"one client", 0, 1, func(int) string { return "203.0.113.7" }, maxParkedPerClient},
		{"one IPv6 network", 0, 1, func(i int) string { return fmt.Sprintf("2001:db8::%x", i+1) }, maxParkedPerClient},
		{"a proxy that does not say for whom", 0, 1, func(int) string { return "" }, 10 * maxParkedPerClient},
		{"all", maxParked - 500, 5, other, 500},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "QR_RATE=0")
				for i := range test.taken {
					if n := strconv.Itoa(i); !w.parked.enter(digest(n), n, 1) {
						t.Fatalf("no place after %d", i)
					}
				}
				start := time.Now()
				var ticket string
				var wg sync.WaitGroup
				for i := range test.want + 5 {
					if i%test.perTicket == 0 {
						ticket = w.begin(t, "getauthqr").Ticket
					}
					target := "/wechat/checklogin?wait=30&ticket=" + ticket
					from := []string{"peer", "127.0.0.1:1", "X-Forwarded-For", test.forwarded(i)}
					wg.Go(func() { w.do("GET", target, "", from...) })
				}
				synctest.Wait()
				equal(t, "polls are parked", w.parked.count()-test.taken, test.want)
				wg.Wait()
				equal(t, "the parked polls end after", time.Since(start), maxWait*time.Second)
				p := &w.parked
				if p.total != test.taken || len(p.tickets) != test.taken || len(p.clients) != test.taken {
					t.Errorf("%d places are still taken, want %d", p.total, test.taken)
				}
			})
		})
	}
}

func TestPollThatWouldHoldMuchIsAnsweredAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		target := "/wechat/checklogin?wait=30&ticket=" + w.begin(t, "getauthqr").Ticket
		long, start := strings.Repeat("x", 1000), time.Now()
		w.do("GET", target+"&x="+long, "")
		w.do("GET", target, "body")
		equal(t, "answered after", time.Since(start), 0)
	})
}

// parkAll opens a connection for each request, sends it, and closes it with the
// test. A few at a time, so that it is the parked polls that are measured.
func parkAll(t *testing.T, base string, requests ...string) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, len(requests))
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < len(requests); i += 4 {
				conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				t.Cleanup(func() { conn.Close() })
				conns[i] = conn
				io.WriteString(conn, requests[i])
			}
		})
	}
	wg.Wait()
	return conns
}

// TestTinyHeadersTakeNoMemory parks polls with as many headers as a request may
// have, each of its own name, at the real program: on one ticket, where most are
// over the cap, and on many, from many addresses.
func TestTinyHeadersTakeNoMemory(t *testing.T) {
	const polls, most = 2000, 250 << 20 // bytes; the unit file's MemoryMax is 1 GB
	var headers strings.Builder
	for i := 0; headers.Len() < 11<<10; i++ {
		headers.WriteString(strconv.FormatInt(int64(i), 36) + ":\r\n")
	}
	path := build(t)
	t.Setenv("METRICS_TOKEN", "letmein")
	for _, test := range []struct {
		name                 string
		perTicket, perClient int
		parked               int
	}{
		{"on one ticket", polls, polls, maxParkedPerTicket},
		{"on many tickets, from many addresses", maxParkedPerTicket, maxParkedPerClient, polls},
	} {
		base, cmd := launch(t, path)
		requests := make([]string, polls)
		var ticket string
		for i := range requests {
			if i%test.perTicket == 0 {
				ticket = begun(t, base, "getauthqr").Ticket
			}
			requests[i] = fmt.Sprintf("GET /wechat/checklogin?wait=30&ticket=%s HTTP/1.1\r\nHost: x\r\n"+
				"X-Forwarded-For: 203.0.113.%d\r\n%s\r\n", ticket, i/test.perClient, headers.String())
		}
		parkAll(t, base, requests...)
		waitFor(t, base, test.parked)
		peak, now := memoryOf(t, cmd.Process.Pid)
		if t.Logf("%s: peak RSS %d MB, now %d MB", test.name, peak>>20, now>>20); peak > most {
			t.Errorf("%s: %d polls take %d MB", test.name, polls, peak>>20)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// waitFor returns when that many polls are parked.
func waitFor(t *testing.T, base string, parked int) {
	t.Helper()
	want := fmt.Sprintf("\nwxscan_waiting_browsers %d\n", parked)
	s := &soak{t: t, base: base, client: http.DefaultClient}
	eventually(t, want, func() bool {
		return strings.Contains(s.get("/metrics", 200, "Authorization", "Bearer letmein"), want)
	})
}

func TestBrowserThatGoesAwayFreesItsPlaceAtOnce(t *testing.T) {
	base, _, _ := start(t, only("METRICS_TOKEN=letmein"), "-demo", "-addr", "127.0.0.1:0")
	ticket := begun(t, base, "getauthqr").Ticket
	request := "GET /wechat/checklogin?wait=30&ticket=" + ticket + " HTTP/1.1\r\nHost: x\r\n\r\n"
	conns := parkAll(t, base, slices.Repeat([]string{request}, maxParkedPerTicket)...)
	waitFor(t, base, maxParkedPerTicket)
	for range 2 * maxParkedPerTicket { // each place, more than once
		conns[0].Close()
		waitFor(t, base, maxParkedPerTicket-1)
		conns = append(conns[1:], parkAll(t, base, request)...)
		waitFor(t, base, maxParkedPerTicket)
	}
}
