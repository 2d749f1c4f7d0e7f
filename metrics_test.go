package main

import (
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// metricsFor asks for /metrics from an address, with a token.
func (w *world) metricsFor(peer, forwarded, token string) *httptest.ResponseRecorder {
	authorization := strings.TrimSuffix("Bearer "+token, "Bearer ")
	return w.do("GET", "/metrics", "", "peer", peer, "X-Forwarded-For", forwarded, "Authorization", authorization)
}

func TestMetricsTellWhatHasHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "METRICS_TOKEN=letmein")
		scan, auth := w.begin(t, "getloginqr"), w.begin(t, "getauthqr")
		w.scan(auth.Ticket, "alice", "decline")
		time.AfterFunc(2*time.Second, func() { w.scan(scan.Ticket, "alice", "") })
		time.AfterFunc(time.Second, func() {
			if page := w.metricsFor("127.0.0.1:1", "", "letmein").Body.String(); !strings.Contains(page, "wxscan_waiting_browsers 1\n") {
				t.Errorf("a browser waits: %s", page)
			}
		})
		w.check(t, scan.Ticket, "25")
		w.check(t, scan.Ticket, "25") // learns nothing new
		w.scan(auth.Ticket, "alice", "")
		time.Sleep(20 * time.Millisecond)
		w.check(t, auth.Ticket, "")
		w.begin(t, "getauthqr")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		page := w.metricsFor("127.0.0.1:1", "", "letmein").Body.String()
		for _, want := range []string{
			`wxscan_tickets_total{flow="scan"} 1`, `wxscan_tickets_total{flow="auth"} 2`,
			`wxscan_logins_total{flow="scan",outcome="done"} 1`, `wxscan_logins_total{flow="auth",outcome="done"} 1`,
			`wxscan_logins_total{flow="auth",outcome="denied"} 1`, `wxscan_logins_total{flow="auth",outcome="expired"} 1`,
			`wxscan_wechat_calls_total{path="/cgi-bin/qrcode/create",result="ok"} 1`, "wxscan_waiting_browsers 0", "wxscan_live_tickets 0",
			"wxscan_access_token_age_seconds 602.02",
		} {
			if !strings.Contains(page, "\n"+want+"\n") {
				t.Errorf("no %s in\n%s", want, page)
			}
		}
	})
}

func TestMetricsAreForTheTokenAlone(t *testing.T) {
	w, open := newWorld(t), newWorld(t, "METRICS_TOKEN=letmein")
	for _, test := range []struct {
		w                      *world
		peer, forwarded, token string
		want                   int
	}{
		{w, "127.0.0.1:1", "", "", 404}, {w, "[::1]:1", "", "", 404}, {w, "@", "", "", 404},
		{w, "127.0.0.1:1", "", "letmein", 404},
		{w, "203.0.113.7:1", "", "", 404}, {w, "127.0.0.1:1", "203.0.113.7", "", 404}, {w, "203.0.113.7:1", "127.0.0.1", "", 404},
		{open, "127.0.0.1:1", "", "", 404}, {open, "127.0.0.1:1", "", "letmein", 200},
		{open, "203.0.113.7:1", "", "letmein", 200}, {open, "203.0.113.7:1", "", "letmeinx", 404}, {open, "203.0.113.7:1", "", "", 404},
	} {
		if out := test.w.metricsFor(test.peer, test.forwarded, test.token); out.Code != test.want {
			t.Errorf("%s for %q with %q: %d, want %d", test.peer, test.forwarded, test.token, out.Code, test.want)
		}
	}
}

func TestALoginThatNobodyPollsIsCounted(t *testing.T) {
	w := newWorld(t, "METRICS_TOKEN=letmein")
	w.scan(w.begin(t, "getloginqr").Ticket, "alice", "")
	if page := w.metricsFor("127.0.0.1:1", "", "letmein").Body.String(); !strings.Contains(page, `outcome="done"} 1`) {
		t.Errorf("no login in\n%s", page)
	}
}

func TestPromtoolLikesTheMetrics(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	w := newWorld(t, "METRICS_TOKEN=letmein")
	w.begin(t, "getloginqr")
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = w.metricsFor("127.0.0.1:1", "", "letmein").Body
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestLinesOfALoginShareAnID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		w.check(t, qr.Ticket, "")
		w.check(t, qr.Ticket, "")
		w.begin(t, "getloginqr")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		var lines []string
		for line := range strings.Lines(w.logged.String()) {
			if _, word, ok := strings.Cut(line, `msg="login `); ok && (strings.Contains(line, "login="+digest(qr.Ticket).String()[:8]) || strings.Contains(word, "flow=scan")) {
				lines = append(lines, word[:strings.Index(word, `"`)])
			}
		}
		if got := strings.Join(lines, " "); got != "pending done pending expired" {
			t.Errorf("lines: %s\n%s", got, w.logged)
		}
	})
}
