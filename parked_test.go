package main

import (
	"fmt"
	"io"
	"net"
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
		{"a proxy that does not say for whom", 0, 8, func(int) string { return "" }, 10 * maxParkedPerClient},
		{"all", maxParked - 100, 5, other, 100},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "QR_RATE=0")
				p := &w.parked
				for i := range test.taken {
					p.enter(digest(strconv.Itoa(i)), strconv.Itoa(i), 1)
				}
				start, ticket := time.Now(), ""
				var polls sync.WaitGroup
				for i := range test.want + 5 {
					if i%test.perTicket == 0 {
						ticket = w.begin(t, "getauthqr").Ticket
					}
					target, from := "/wechat/checklogin?wait=30&ticket="+ticket, test.forwarded(i)
					polls.Go(func() { w.do("GET", target, "", "peer", "127.0.0.1:1", "X-Forwarded-For", from) })
				}
				synctest.Wait()
				equal(t, "polls are parked", p.count()-test.taken, test.want)
				polls.Wait()
				equal(t, "the parked polls end after", time.Since(start), maxWait*time.Second)
				places := [...]int{p.total, len(p.tickets), len(p.clients)}
				equal(t, "places still taken", places, [...]int{test.taken, test.taken, test.taken})
			})
		})
	}
}

func TestPollThatWouldHoldMuchIsAnsweredAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		target := "/wechat/checklogin?wait=30&ticket=" + w.begin(t, "getauthqr").Ticket
		start := time.Now()
		w.do("GET", target+"&x="+strings.Repeat("x", maxParkedURI), "")
		w.do("GET", target, "body")
		equal(t, "answered after", time.Since(start), 0)
	})
}

// park opens a connection for each request, and sends it. The connections close
// with the test.
func park(t *testing.T, base string, requests ...string) (conns []net.Conn) {
	t.Helper()
	for _, request := range requests {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		io.WriteString(conn, request)
		conns = append(conns, conn)
	}
	return conns
}

// TestTinyHeadersTakeNoMemory parks polls with as many headers as a request may
// have, each of its own name, at the real program: on many tickets, from many
// addresses, so that no cap stops them.
func TestTinyHeadersTakeNoMemory(t *testing.T) {
	t.Parallel()
	const polls, most = 500, 100 << 20 // bytes; with their headers, they take 270 MB
	var headers strings.Builder
	for i := 0; headers.Len() < 11<<10; i++ {
		headers.WriteString(strconv.FormatInt(int64(i), 36) + ":\r\n")
	}
	base, cmd := launch(t, build(t), "METRICS_TOKEN=letmein")
	ticket := ""
	for i := range polls {
		if i%maxParkedPerTicket == 0 {
			ticket = begun(t, base, "getauthqr").Ticket
		}
		park(t, base, fmt.Sprintf("GET /wechat/checklogin?wait=30&ticket=%s HTTP/1.1\r\nHost: x\r\n"+
			"X-Forwarded-For: 203.0.113.%d\r\n%s\r\n", ticket, i/maxParkedPerClient, headers.String()))
	}
	waitFor(t, base, polls)
	if peak, _ := memoryOf(t, cmd.Process.Pid); peak > most {
		t.Errorf("%d polls take %d MB", polls, peak>>20)
	}
}

// waitFor returns when that many polls are parked.
func waitFor(t *testing.T, base string, parked int) {
	t.Helper()
	want := fmt.Sprintf("\nwxscan_waiting_browsers %d\n", parked)
	w := remote(t, base)
	eventually(t, want, func() bool { return strings.Contains(w.metricsFor("letmein").Body.String(), want) })
}

func TestBrowserThatGoesAwayFreesItsPlaceAtOnce(t *testing.T) {
	base, _, _ := start(t, only("METRICS_TOKEN=letmein"), "-demo", "-addr", "127.0.0.1:0")
	ticket := begun(t, base, "getauthqr").Ticket
	request := "GET /wechat/checklogin?wait=30&ticket=" + ticket + " HTTP/1.1\r\nHost: x\r\n\r\n"
	conns := park(t, base, slices.Repeat([]string{request}, maxParkedPerTicket)...)
	waitFor(t, base, maxParkedPerTicket)
	for _, conn := range conns {
		conn.Close()
		waitFor(t, base, maxParkedPerTicket-1)
		park(t, base, request)
		waitFor(t, base, maxParkedPerTicket)
	}
}
