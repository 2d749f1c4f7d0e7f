package main

import (
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// metricsFor asks for /metrics with a token.
func (w *world) metricsFor(token string) *httptest.ResponseRecorder {
	authorization := strings.TrimSuffix("Bearer "+token, "Bearer ")
	return w.do("GET", "/metrics", "", "peer", "127.0.0.1:1", "Authorization", authorization)
}

func TestMetricsTellWhatHasHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "METRICS_TOKEN=letmein")
		tells := func(lines ...string) {
			t.Helper()
			page := w.metricsFor("letmein").Body.String()
			for _, line := range lines {
				if !strings.Contains(page, "\nwxscan_"+line+"\n") {
					t.Errorf("no %s in\n%s", line, page)
				}
			}
		}
		scan, auth, unpolled := w.begin(t, "getloginqr"), w.begin(t, "getauthqr"), w.begin(t, "getloginqr")
		w.scan(auth.Ticket, "alice", "decline")
		time.AfterFunc(2*time.Second, func() { w.scan(scan.Ticket, "alice", "") })
		time.AfterFunc(time.Second, func() { tells("waiting_browsers 1") })
		w.check(t, scan.Ticket, "25")
		w.check(t, scan.Ticket, "25") // learns nothing new
		w.scan(auth.Ticket, "alice", "")
		w.scan(unpolled.Ticket, "alice", "")
		w.begin(t, "getauthqr")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		tells(`tickets_total{flow="scan"} 2`, `tickets_total{flow="auth"} 2`,
			`logins_total{flow="scan",outcome="done"} 2`, `logins_total{flow="auth",outcome="expired"} 1`,
			`logins_total{flow="auth",outcome="done"} 1`, `logins_total{flow="auth",outcome="denied"} 1`,
			`wechat_calls_total{path="/cgi-bin/qrcode/create",result="ok"} 2`,
			"waiting_browsers 0", "live_tickets 0", "access_token_age_seconds 602")
	})
}

func TestMetricsAreForTheTokenAlone(t *testing.T) {
	w, open := newWorld(t), newWorld(t, "METRICS_TOKEN=letmein")
	for _, test := range []struct {
		w     *world
		token string
		want  int
	}{{w, "", 404}, {w, "letmein", 404}, {open, "", 404}, {open, "letmeinx", 404}, {open, "letmein", 200}} {
		if out := test.w.metricsFor(test.token); out.Code != test.want {
			t.Errorf("%q: %d, want %d", test.token, out.Code, test.want)
		}
	}
}

func TestPromtoolLikesTheMetrics(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	w := newWorld(t, "METRICS_TOKEN=letmein")
	w.begin(t, "getloginqr")
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = w.metricsFor("letmein").Body
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
			_, word, isLogin := strings.Cut(line, `msg="login `)
			if isLogin && strings.Contains(line, "login="+digest(qr.Ticket).String()[:8]) {
				lines = append(lines, word[:strings.Index(word, `"`)])
			}
		}
		if got := strings.Join(lines, " "); got != "pending done" {
			t.Errorf("lines: %s\n%s", got, w.logged)
		}
		if !strings.Contains(w.logged.String(), `msg="login expired"`) {
			t.Errorf("no line on who never scanned: %s", w.logged)
		}
	})
}
