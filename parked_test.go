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
		{"one customer's IPv6 addresses", 0, 1, func(i int) string { return fmt.Sprintf("2001:db8::%x", i+1) }, maxParkedPerClient},
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
					wg.Go(func() { w.do("GET", target, "", "peer", "127.0.0.1:1", "X-Forwarded-For", test.forwarded(i)) })
				}
				synctest.Wait()
				if got := w.parked.count() - test.taken; got != test.want {
					t.Errorf("%d polls are parked, want %d", got, test.want)
				}
				wg.Wait()
				if took := time.Since(start); took != maxWait*time.Second {
					t.Errorf("the parked polls end after %v", took)
				}
				if p := &w.parked; p.total != test.taken || len(p.tickets) != test.taken || len(p.clients) != test.taken {
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
		if took := time.Since(start); took != 0 {
			t.Errorf("answered after %v", took)
		}
	})
}

// parkAll opens a connection for each request, sends it, and fails if one is
// answered at once. A few at a time, so that it is the parked polls that are measured.
func parkAll(t *testing.T, base string, requests []string) (conns []net.Conn) {
	t.Helper()
	conns = make([]net.Conn, len(requests))
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < len(requests); i += 4 {
				conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				conns[i] = conn
				io.WriteString(conn, requests[i])
			}
		})
	}
	wg.Wait()
	t.Cleanup(func() {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
	})
	return conns
}

// tinyHeaders are as many as a request may have, each of its own name.
func tinyHeaders() string {
	const names = "abcdefghijklmnopqrstuvwxyz0123456789"
	var b strings.Builder
	for i := 0; b.Len() < 11<<10; i++ {
		fmt.Fprintf(&b, "%c%c:\r\n", names[i/len(names)%len(names)], names[i%len(names)])
		if i/len(names) >= len(names) { // all of two letters are used up
			fmt.Fprintf(&b, "%s:\r\n", strconv.FormatInt(int64(i), 36))
		}
	}
	return b.String()
}

// TestTinyHeadersTakeNoMemory parks polls with as many headers as a request may
// have, at the real program: on one ticket, where most are over the cap, and on
// many, from many addresses.
func TestTinyHeadersTakeNoMemory(t *testing.T) {
	const polls, most = 2000, 250 << 20 // bytes; the unit file's MemoryMax is 1 GB
	path, headers := build(t), tinyHeaders()
	t.Setenv("QR_RATE", "0")
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
			requests[i] = fmt.Sprintf("GET /wechat/checklogin?wait=30&ticket=%s HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nX-Forwarded-For: 203.0.113.%d\r\n%s\r\n",
				ticket, i/test.perClient, headers)
		}
		parkAll(t, base, requests)
		waitFor(t, base, test.parked)
		peak, now := memoryOf(t, cmd.Process.Pid)
		t.Logf("%s: peak RSS %d MB, now %d MB", test.name, peak>>20, now>>20)
		if peak > most {
			t.Errorf("%s: %d polls take %d MB", test.name, polls, peak>>20)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// waitFor returns when that many polls are parked.
func waitFor(t *testing.T, base string, parked int) {
	t.Helper()
	want, page := fmt.Sprintf("\nwxscan_waiting_browsers %d\n", parked), ""
	for range 500 {
		req, err := http.NewRequest("GET", base+"/metrics", nil)
		must(t, err)
		req.Header.Set("Authorization", "Bearer letmein")
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		must(t, err)
		if page = string(body); strings.Contains(page, want) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("no %q in %s", want, page)
}

func TestBrowserThatGoesAwayFreesItsPlaceAtOnce(t *testing.T) {
	base, _, _ := start(t, only("METRICS_TOKEN=letmein"), "-demo", "-addr", "127.0.0.1:0")
	ticket := begun(t, base, "getauthqr").Ticket
	request := "GET /wechat/checklogin?wait=30&ticket=" + ticket + " HTTP/1.1\r\nHost: x\r\n\r\n"
	conns := parkAll(t, base, slices.Repeat([]string{request}, maxParkedPerTicket))
	waitFor(t, base, maxParkedPerTicket)
	if before := time.Now(); polled(t, base, ticket, "25").Status != statusPending || time.Since(before) > time.Second {
		t.Errorf("a poll over the cap is answered after %v", time.Since(before))
	}
	for range 20 { // each place, more than once
		conns[0].Close()
		waitFor(t, base, maxParkedPerTicket-1)
		conns = append(conns[1:], parkAll(t, base, []string{request})...)
		waitFor(t, base, maxParkedPerTicket)
	}
}
