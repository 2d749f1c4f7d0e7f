package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// bearable is how long a test bears a request before it takes the server to hang.
const bearable = 5 * time.Second

// remote returns a world whose server is at base, to be asked over real sockets. A
// request that is not answered in time is answered with 502.
func remote(t *testing.T, base string) *world {
	to, err := url.Parse(base)
	must(t, err)
	proxy := httputil.NewSingleHostReverseProxy(to)
	transport := &http.Transport{MaxIdleConnsPerHost: 100, ResponseHeaderTimeout: bearable}
	t.Cleanup(transport.CloseIdleConnections)
	proxy.Transport = transport
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, err error) {
		http.Error(w, err.Error(), http.StatusBadGateway)
	}
	return &world{handler: proxy}
}

// inTime fails the test, with all stacks, unless f returns in time.
func inTime(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(d):
		all := make([]byte, 1<<20)
		t.Fatalf("%s: not within %v; all goroutines:\n%s", what, d, all[:runtime.Stack(all, true)])
	}
}

// login is one login from its beginning to the session, with the browser's poll
// parked meanwhile, and an attentive person where the phone asks.
func (w *world) login(t *testing.T, begin, openID string) {
	ticket := w.begin(t, begin).Ticket
	answered := make(chan pollAnswer, 1)
	go func() {
		var answer pollAnswer
		for answer.Status == "" || answer.Status == statusPending || answer.Status == statusScanned {
			answer = w.check(t, ticket, "1&status="+string(answer.Status))
		}
		answered <- answer
	}()
	if secret := w.claim(ticket, openID); secret != "" {
		hidden, _ := w.askedPhone(secret)
		time.Sleep(holdBack + 100*time.Millisecond)
		w.submit("/wechat/confirm", append(hidden, "answer", w.check(t, ticket, "").Number)...)
	}
	answer := <-answered
	equal(t, begin+" logs in", answer.OpenID, openID)
	session := w.do("GET", "/wechat/session", "", "Authorization", "Bearer "+answer.Token)
	equal(t, "session", session.Code, 200)
	equal(t, "logout", w.do("POST", "/wechat/logout", "").Code, 204)
}

// look asks for everything that is no login. A poll is parked, and left.
func (w *world) look(t *testing.T) {
	ticket := "?ticket=" + w.begin(t, "getauthqr").Ticket
	gone, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	poll := httptest.NewRequestWithContext(gone, "GET", "/wechat/checklogin"+ticket+"&wait=30", nil)
	w.handler.ServeHTTP(httptest.NewRecorder(), poll)
	for path, want := range map[string]int{
		"/wechat/qr.svg" + ticket: 200, "/wechat/checklogin?wait=1&ticket=none": 200, "/wechat/confirm?s=none": 303,
		"/wechat/accessusercode?code=x&state=none": 303, "/wechat/session": 401, "/": 200, "/static/wxscan.js": 200,
		"/healthz": 200, "/none": 404, "/metrics": 404,
	} {
		equal(t, path, w.do("GET", path, "").Code, want)
	}
}

// TestEverythingAtOnceNeverHangs soaks the program, and the server with CONFIRM, each
// for 3 seconds or WXSCAN_SOAK, and ends them. The fault that this is for: scraped
// while QR codes were made, the program hung for good, and SIGTERM did not end it.
func TestEverythingAtOnceNeverHangs(t *testing.T) {
	t.Parallel()
	d := 3 * time.Second
	if value := os.Getenv("WXSCAN_SOAK"); value != "" {
		var err error
		d, err = time.ParseDuration(value)
		must(t, err)
	}
	settings := []string{"METRICS_TOKEN=letmein", "QR_RATE=0", "TICKET_TTL=2s", "FLOWS=scan,auth,code"}
	path := build(t)
	for name, begin := range map[string]func(t *testing.T) (base string, end func() error){
		"the program": func(t *testing.T) (string, func() error) {
			base, cmd := launch(t, path, settings...)
			return base, func() error { must(t, cmd.Process.Signal(syscall.SIGTERM)); return cmd.Wait() }
		},
		"with CONFIRM": func(t *testing.T) (string, func() error) {
			ctx, stop := context.WithCancel(t.Context())
			getenv, logged, ended := only(append(settings, "CONFIRM=true")...), new(syncBuffer), make(chan error, 1)
			go func() { ended <- run(ctx, []string{"-demo", "-addr", "127.0.0.1:0"}, getenv, io.Discard, logged) }()
			return listening(t, logged), func() error { stop(); return <-ended }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base, end := begin(t)
			w := remote(t, base)
			ctx, enough := context.WithTimeout(t.Context(), d)
			defer enough()
			var all sync.WaitGroup
			var logins atomic.Int64
			loop := func(work func(i int)) {
				all.Go(func() {
					for i := 0; ctx.Err() == nil && !t.Failed(); i++ {
						work(i)
					}
				})
			}
			for n, begin := range []string{"getloginqr", "getauthqr", "getlogincode", "getloginqr", "getauthqr"} {
				loop(func(i int) { w.login(t, begin, fmt.Sprintf("user-%d-%d", n, i)); logins.Add(1) })
				loop(func(int) { equal(t, "/metrics", w.metricsFor("letmein").Code, 200) })
				loop(func(int) { w.begin(t, begin) })
			}
			loop(func(int) { w.look(t) })
			inTime(t, d+2*bearable, "the requests end", all.Wait)
			if t.Logf("%d logins in %v", logins.Load(), d); logins.Load() == 0 {
				t.Error("nobody has logged in")
			}
			inTime(t, 5*time.Second, "a login after all that", func() { w.look(t); w.login(t, "getauthqr", "last") })
			inTime(t, 8*time.Second, "the end", func() { must(t, end()) })
		})
	}
}
