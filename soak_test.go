package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// bearable is how long a test bears a request before it takes the server to hang.
const bearable = 5 * time.Second

// A soak uses all of a -demo at once, over real sockets, for some time.
type soak struct {
	t      *testing.T
	base   string
	client *http.Client
	ctx    context.Context // ends with the time for new work, or at the first fault
	enough context.CancelFunc
	logins atomic.Int64
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

func (s *soak) fault(format string, args ...any) {
	s.t.Errorf(format, args...)
	s.enough()
}

// ask makes a request, and returns the answer if it has the status that is wanted.
// headers are names and values.
func (s *soak) ask(method, path, body string, want int, headers ...string) string {
	req, err := http.NewRequest(method, s.base+path, strings.NewReader(body))
	must(s.t, err)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.fault("%s %s: %v", method, path, err)
		return ""
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err == nil && resp.StatusCode == want {
		return string(text)
	}
	s.fault("%s %s: %d, %v, want %d", method, path, resp.StatusCode, err, want)
	return ""
}

func (s *soak) get(path string, want int) string { return s.ask("GET", path, "", want) }

func (s *soak) getJSON(path string, v any) {
	if body := s.get(path, 200); json.Unmarshal([]byte(body), v) != nil {
		s.fault("GET %s: %q", path, body)
	}
}

func (s *soak) metrics() string {
	return s.ask("GET", "/metrics", "", 200, "Authorization", "Bearer letmein")
}

// login is one login from its beginning to the session, with the browser's poll
// parked meanwhile.
func (s *soak) login(begin, openID string) {
	var qr qrAnswer
	s.getJSON("/wechat/"+begin, &qr)
	answered := make(chan pollAnswer, 1)
	go func() {
		var answer pollAnswer
		end := time.Now().Add(bearable)
		for !answer.Login && answer.Status != statusExpired && time.Now().Before(end) {
			s.getJSON("/wechat/checklogin?ticket="+qr.Ticket+"&wait=1&status="+string(answer.Status), &answer)
		}
		answered <- answer
	}()
	shown := s.ask("POST", "/demo/scan?openid="+openID+"&ticket="+qr.Ticket, "", 200)
	if link := regexp.MustCompile(`/wechat/confirm\?s=\w+`).FindString(shown); link != "" {
		s.decide(link, qr.Ticket)
	}
	answer := <-answered
	if !answer.Login || answer.OpenID != openID {
		s.fault("%s for %s ends as %+v; the phone shows %q", begin, openID, answer, shown)
	}
	s.ask("GET", "/wechat/session", "", 200, "Authorization", "Bearer "+answer.Token)
	s.ask("POST", "/wechat/logout", "", 204)
	s.logins.Add(1)
}

// decide answers the phone's question as an attentive person does.
func (s *soak) decide(link, ticket string) {
	page := s.get(link, 200)
	var answer pollAnswer
	s.getJSON("/wechat/checklogin?ticket="+ticket, &answer)
	form := url.Values{"answer": {answer.Number}}
	hidden := regexp.MustCompile(`type="hidden" name="(\w+)" value="([^"]*)"`)
	for _, field := range hidden.FindAllStringSubmatch(page, -1) {
		form.Set(field[1], field[2])
	}
	time.Sleep(holdBack + 100*time.Millisecond)
	s.ask("POST", "/wechat/confirm", form.Encode(), 200, "Content-Type", "application/x-www-form-urlencoded")
}

// look asks for everything that is no login. A poll is parked, and left.
func (s *soak) look() {
	var qr qrAnswer
	s.getJSON("/wechat/getauthqr", &qr)
	hasty := &http.Client{Transport: s.client.Transport, Timeout: 50 * time.Millisecond}
	hasty.Get(s.base + "/wechat/checklogin?wait=30&ticket=" + qr.Ticket)
	for path, want := range map[string]int{
		"/wechat/qr.svg?ticket=" + qr.Ticket: 200, "/wechat/checklogin?wait=1&ticket=none": 200,
		"/wechat/accessusercode?code=x&state=none": 200, "/wechat/confirm?s=none": 200, // the phone's page of failure
		"/wechat/session": 401, "/": 200, "/static/wxscan.js": 200, "/healthz": 200, "/none": 404, "/metrics": 404,
	} {
		s.get(path, want)
	}
}

// work works until ctx ends, and returns when all is answered.
func (s *soak) work() {
	var all sync.WaitGroup
	loop := func(work func(i int)) {
		all.Go(func() {
			for i := 0; s.ctx.Err() == nil; i++ {
				work(i)
			}
		})
	}
	for n, begin := range []string{"getloginqr", "getauthqr", "getlogincode", "getloginqr", "getauthqr"} {
		loop(func(i int) { s.login(begin, fmt.Sprintf("user-%d-%d", n, i)) })
		loop(func(int) { s.metrics() })
		loop(func(int) { s.getJSON("/wechat/"+begin, new(qrAnswer)) })
	}
	loop(func(int) { s.look() })
	all.Wait()
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
			transport := &http.Transport{MaxIdleConnsPerHost: 100}
			t.Cleanup(transport.CloseIdleConnections)
			s := &soak{t: t, base: base, client: &http.Client{Transport: transport, Timeout: bearable}}
			s.ctx, s.enough = context.WithTimeout(t.Context(), d)
			defer s.enough()
			inTime(t, d+2*bearable, "the requests end", s.work)
			if t.Logf("%d logins in %v", s.logins.Load(), d); s.logins.Load() == 0 {
				t.Error("nobody has logged in")
			}
			s.client.Timeout = 2 * time.Second // polls wait for one
			s.look()
			s.login("getauthqr", "last")
			inTime(t, 8*time.Second, "the end", func() { must(t, end()) })
		})
	}
}
