package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
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

// A soak uses all of a server at once, over real sockets, for some time.
type soak struct {
	base, demo string // the server, and its simulator
	confirm    bool
	faulty     bool   // WeChat fails at times, so a login may fail
	shown      *store // what the QR codes say, for the simulator's camera

	ctx    context.Context // ends with the time for new work
	client *http.Client
	logins atomic.Int64
	mu     sync.Mutex // guards faults
	faults []string
}

// soakTime is 3 seconds, or WXSCAN_SOAK.
func soakTime(t *testing.T) time.Duration {
	value := os.Getenv("WXSCAN_SOAK")
	if value == "" {
		return 3 * time.Second
	}
	d, err := time.ParseDuration(value)
	must(t, err)
	return d
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

// fault notes what should not have happened.
func (s *soak) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) < 10 {
		s.faults = append(s.faults, fmt.Sprintf(format, args...))
	}
}

// report fails the test for each fault.
func (s *soak) report(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fault := range s.faults {
		t.Error(fault)
	}
	s.faults = nil
}

// send makes a request; headers are names and values. The answer to a request
// that ctx ends is "", with status 0.
func (s *soak) send(ctx context.Context, method, url, body string, headers ...string) (int, string) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		s.fault("%v", err)
		return 0, ""
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := s.client.Do(req)
	if err != nil {
		if ctx.Err() == nil {
			s.fault("%s: %v", method, err)
		}
		return 0, ""
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil && ctx.Err() == nil {
		s.fault("%s: %v", req.URL.Path, err)
	}
	return resp.StatusCode, string(text)
}

// get expects a status of a path; 0 is any.
func (s *soak) get(path string, want int, headers ...string) string {
	status, body := s.send(context.Background(), "GET", s.base+path, "", headers...)
	if status != want && want != 0 {
		s.fault("GET %s: %d, want %d", path, status, want)
	}
	return body
}

func (s *soak) getJSON(path string, v any) bool {
	body := s.get(path, 0)
	err := json.Unmarshal([]byte(body), v)
	if err != nil {
		s.fault("GET %.40s: %v in %q", path, err, body)
	}
	return err == nil
}

// login is one login from the QR code to the session, with the browser's poll
// parked meanwhile.
func (s *soak) login(begin, openID string) {
	var qr qrAnswer
	if !s.getJSON("/wechat/"+begin, &qr) || qr.Ticket == "" {
		if !s.faulty {
			s.fault("no ticket from %s", begin)
		}
		return
	}
	s.shown.begin(s.ctx, qr.Ticket, flowScan, qr.URL, asker{})
	ticket := url.QueryEscape(qr.Ticket)
	s.get("/wechat/qr.png?ticket="+ticket, 200)
	answered := make(chan pollAnswer, 1)
	go func() {
		var answer pollAnswer
		for deadline := time.Now().Add(bearable); !answer.Login && answer.Status != statusExpired; {
			path := "/wechat/checklogin?ticket=" + ticket + "&wait=1&status=" + string(answer.Status)
			if time.Now().After(deadline) || !s.getJSON(path, &answer) {
				break
			}
		}
		answered <- answer
	}()
	scan := s.demo + "/demo/scan?openid=" + openID + "&ticket=" + ticket
	if openID == "" { // nobody scans
		return
	}
	_, shown := s.send(context.Background(), "POST", scan, "")
	if link := regexp.MustCompile(`/wechat/confirm\?s=\w+`).FindString(shown); s.confirm && link != "" {
		s.decide(link, ticket)
	}
	switch answer := <-answered; {
	case answer.Login && answer.OpenID == openID:
		s.logins.Add(1)
		s.get("/wechat/session", 200, "Authorization", "Bearer "+answer.Token)
		s.send(context.Background(), "POST", s.base+"/wechat/logout", "")
	case !s.faulty:
		s.fault("%s for %s ends as %+v; the phone shows %q", begin, openID, answer, shown)
	}
}

// decide answers the phone's question as an attentive person does.
func (s *soak) decide(link, ticket string) {
	page := s.get(link, 0)
	var answer pollAnswer
	s.getJSON("/wechat/checklogin?ticket="+ticket, &answer)
	form := url.Values{"answer": {answer.Number}}
	hidden := regexp.MustCompile(`type="hidden" name="(\w+)" value="([^"]*)"`)
	for _, field := range hidden.FindAllStringSubmatch(page, -1) {
		form.Set(field[1], field[2])
	}
	time.Sleep(holdBack + 100*time.Millisecond)
	s.send(context.Background(), "POST", s.base+"/wechat/confirm", form.Encode(),
		"Content-Type", "application/x-www-form-urlencoded")
}

// look asks for everything that is no login.
func (s *soak) look() {
	s.get("/metrics", 200, "Authorization", "Bearer letmein")
	signed := (&config{token: testToken}).signedQuery().Encode()
	if echo := s.get("/wechat/message?echostr=echo&"+signed, 200); echo != "echo" {
		s.fault("the URL check is answered %q", echo)
	}
	s.get("/wechat/message", 0) // 403, or 429 after some
	for path, want := range map[string]int{
		"/metrics": 404, "/wechat/checklogin?wait=1&ticket=none": 200, "/wechat/qr.png?ticket=none": 404,
		"/wechat/accessusercode?code=x&state=none": 200, "/wechat/confirm?s=none": 200, // the phone's page of failure
		"/wechat/session": 401, "/": 200, "/static/wxscan.js": 200, "/healthz": 200, "/none": 404,
	} {
		s.get(path, want)
	}
}

// leave parks a poll and goes away.
func (s *soak) leave() {
	var qr qrAnswer
	if !s.getJSON("/wechat/getauthqr", &qr) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	s.send(ctx, "GET", s.base+"/wechat/checklogin?wait=30&ticket="+qr.Ticket, "")
}

// work works until ctx ends, and returns when all is answered.
func (s *soak) work() {
	var wg sync.WaitGroup
	loop := func(work func(i int)) {
		wg.Go(func() {
			for i := 0; s.ctx.Err() == nil; i++ {
				work(i)
			}
		})
	}
	for n, begin := range []string{"getloginqr", "getauthqr", "getloginqr", "getauthqr"} {
		loop(func(i int) { s.login(begin, fmt.Sprintf("user-%d-%d", n, i)) })
	}
	for range 4 {
		loop(func(int) { s.get("/metrics", 200, "Authorization", "Bearer letmein") })
		loop(func(int) { s.getJSON("/wechat/getauthqr", new(qrAnswer)) })
	}
	loop(func(int) { s.look() })
	loop(func(int) { s.leave() })
	wg.Wait()
}

// A fickleWriter is a log that blocks when it is told to.
type fickleWriter struct {
	io.Writer
	mu sync.Mutex // held while it blocks
}

func (w *fickleWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.Writer.Write(p)
}

// fickleWeChat is a simulator outside of the server, for a soak whose server
// calls it at the URL: it fails now and then, or is slow.
func fickleWeChat(t *testing.T, s *soak, public string) (url string) {
	var calls atomic.Int64
	var simulator http.Handler
	var once sync.Once
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		once.Do(func() { // by now the server's address is known
			config := config{appID: "wx0123456789abcdef", appSecret: testSecret, token: testToken,
				publicURL: public, apiBase: s.base + "/demo", openBase: public + "/demo"}
			simulator = newDemo(config, newHTTPClient(), s.shown)
		})
		isAPI := strings.HasPrefix(r.URL.Path, "/demo/cgi-bin/") || strings.HasPrefix(r.URL.Path, "/demo/sns/")
		switch n := calls.Add(1); {
		case isAPI && n%11 == 0:
			http.Error(w, "bad gateway", http.StatusBadGateway)
		case isAPI && n%13 == 0:
			io.WriteString(w, `{"errcode":-1,"errmsg":"system error"}`)
		case isAPI && n%17 == 0:
			panic(http.ErrAbortHandler) // the connection breaks
		case isAPI && n%7 == 0:
			time.Sleep(200 * time.Millisecond)
			fallthrough
		default:
			simulator.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	server.Config.ErrorLog = nil
	return server.URL
}

// TestEverythingAtOnceNeverHangs soaks three servers: one as it is by default,
// one with CONFIRM, and one whose WeChat is fickle and whose log blocks.
func TestEverythingAtOnceNeverHangs(t *testing.T) {
	for name, setting := range map[string]string{"by default": "", "with CONFIRM": "CONFIRM=true", "with faults": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const public = "http://login.test"
			transport := &http.Transport{MaxIdleConnsPerHost: 100}
			s := &soak{confirm: setting != "", faulty: name == "with faults", client: &http.Client{Transport: transport,
				Timeout: bearable}, shown: newStore(time.Minute, &localRecords{max: math.MaxInt})}
			settings := []string{setting, "METRICS_TOKEN=letmein", "QR_RATE=0", "TICKET_TTL=2s",
				"WECHAT_TOKEN=" + testToken}
			args, logged := []string{"-demo", "-addr", "127.0.0.1:0"}, new(syncBuffer)
			if s.faulty {
				s.demo = fickleWeChat(t, s, public)
				settings = append(settings, "WECHAT_APPID=wx0123456789abcdef", "WECHAT_APPSECRET="+testSecret,
					"PUBLIC_URL="+public, "WECHAT_API_BASE="+s.demo+"/demo", "WECHAT_OPEN_BASE="+public+"/demo",
					"WECHAT_MP_BASE="+public+"/demo")
				args = args[1:]
			}
			stderr := &fickleWriter{Writer: logged}
			ctx, stop := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- run(ctx, args, only(settings...), io.Discard, stderr) }()
			t.Cleanup(stop) // should the test fail before
			s.base = listening(t, logged)
			if !s.faulty {
				s.demo = s.base
			}

			d := soakTime(t)
			var enough context.CancelFunc
			s.ctx, enough = context.WithTimeout(t.Context(), d)
			defer enough()
			if s.faulty {
				time.AfterFunc(d/3, func() { stderr.mu.Lock(); time.AfterFunc(d/3, stderr.mu.Unlock) })
			}
			inTime(t, d+2*bearable, "the requests end", s.work)
			s.report(t)
			if t.Failed() {
				return
			}
			t.Logf("%d logins in %v", s.logins.Load(), d)
			if s.logins.Load() == 0 {
				t.Errorf("nobody has logged in: %s", logged)
			}

			s.client = &http.Client{Transport: transport, Timeout: 2 * time.Second} // from now on; polls wait for one
			s.look()
			s.login("getauthqr", "last")
			s.report(t)
			stop()
			inTime(t, 8*time.Second, "the end", func() { must(t, <-ended) })
		})
	}
}

// The fault that this is for: scraped while QR codes were made, the program hung
// for good, and SIGTERM did not end it.
func TestTermEndsABusyProgram(t *testing.T) {
	for name, value := range map[string]string{"METRICS_TOKEN": "letmein", "QR_RATE": "0"} {
		t.Setenv(name, value)
	}
	base, cmd := launch(t, build(t))
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: bearable}
	ctx, cancel := context.WithTimeout(t.Context(), soakTime(t))
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		for _, path := range []string{"/metrics", "/wechat/getauthqr", "/wechat/getloginqr"} {
			wg.Go(func() {
				for ctx.Err() == nil {
					req, err := http.NewRequest("GET", base+path, nil)
					must(t, err)
					req.Header.Set("Authorization", "Bearer letmein")
					resp, err := client.Do(req)
					if err != nil {
						t.Errorf("%s: %v", path, err)
						return
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		}
	}
	wg.Wait()
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	inTime(t, 8*time.Second, "SIGTERM", func() { must(t, cmd.Wait()) })
}
