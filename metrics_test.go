package main

import (
	"net/http/httptest"
	"os/exec"
	"regexp"
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

func TestMetricsAndLogTellWhatHasHappened(t *testing.T) {
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
		unused := w.begin(t, "getauthqr")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		tells(`tickets_total{flow="scan"} 2`, `tickets_total{flow="auth"} 2`,
			`logins_total{flow="scan",outcome="done"} 2`, `logins_total{flow="auth",outcome="expired"} 1`,
			`logins_total{flow="auth",outcome="done"} 1`, `logins_total{flow="auth",outcome="denied"} 1`,
			`wechat_calls_total{path="/cgi-bin/qrcode/create",result="ok"} 2`,
			"waiting_browsers 0", "live_tickets 0", "access_token_age_seconds 602")
		for ticket, want := range map[string]string{auth.Ticket: "pending done ", unused.Ticket: "pending expired "} {
			lines := regexp.MustCompile(`msg="login (\w+)" login=`+digest(ticket).String()[:8]+" flow=auth\n").
				FindAllStringSubmatch(w.logged.String(), -1)
			var got strings.Builder
			for _, line := range lines {
				got.WriteString(line[1] + " ")
			}
			equal(t, "lines with one ID", got.String(), want)
		}
	})
}

func TestMetricsAreForTheTokenAlone(t *testing.T) {
	w, open := newWorld(t), newWorld(t, "METRICS_TOKEN=letmein")
	equal(t, "without METRICS_TOKEN", w.metricsFor("").Code, 404)
	for token, want := range map[string]int{"": 404, "letmeinx": 404, "letmein": 200} {
		equal(t, token, open.metricsFor(token).Code, want)
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
