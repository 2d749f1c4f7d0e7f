package main

import (
	"context"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var goodSettings = map[string]string{
	"WECHAT_APPID": "wx0123456789abcdef", "WECHAT_APPSECRET": "0123456789abcdef0123456789abcdef",
	"WECHAT_TOKEN": "token123", "PUBLIC_URL": "https://login.example.com",
}

// with returns an environment: the good settings, changed by NAME=value.
func with(changes ...string) func(string) string {
	return func(name string) string {
		for _, change := range changes {
			if value, ok := strings.CutPrefix(change, name+"="); ok {
				return value
			}
		}
		return goodSettings[name]
	}
}

func TestBadSettingsAreNamedInOneLine(t *testing.T) {
	for _, test := range []struct {
		change, want string
		args         []string
	}{
		{change: "WECHAT_APPID=", want: "WECHAT_APPID is not set"},
		{change: "WECHAT_APPID=gh_97417a04a28d", want: "WECHAT_APPID is malformed"},
		{change: "WECHAT_APPSECRET=", want: "WECHAT_APPSECRET is not set"},
		{change: "WECHAT_APPSECRET=hush hush", want: "WECHAT_APPSECRET is malformed"},
		{change: "WECHAT_TOKEN=", want: "WECHAT_TOKEN is not set"},
		{change: "WECHAT_TOKEN=ab", want: "WECHAT_TOKEN is malformed"},
		{change: "WECHAT_TOKEN=hush-hush", want: "WECHAT_TOKEN is malformed"},
		{change: "WECHAT_TOKEN=" + strings.Repeat("a", 33), want: "WECHAT_TOKEN is malformed"},
		{change: "WECHAT_AES_KEY=short", want: "WECHAT_AES_KEY is malformed"},
		{change: "PUBLIC_URL=", want: "PUBLIC_URL (-url) is not set"},
		{change: "PUBLIC_URL=login.example.com", want: "PUBLIC_URL (-url) is malformed"},
		{change: "PUBLIC_URL=https://login.example.com/wechat", want: "PUBLIC_URL (-url) is malformed"},
		{change: "PUBLIC_URL=https://u:p@login.example.com", want: "PUBLIC_URL (-url) is malformed"},
		{change: "PUBLIC_URL=https://login.example.com\n", want: "PUBLIC_URL (-url) is malformed"},
		{change: "PUBLIC_URL=https://login.example.com?x", want: "PUBLIC_URL (-url) is malformed"},
		{args: []string{"-url", "ftp://x"}, want: "PUBLIC_URL (-url) is malformed"},
		{change: "TICKET_TTL=5", want: "TICKET_TTL (-ttl) is malformed"},
		{change: "TICKET_TTL=1500ms", want: "TICKET_TTL (-ttl) is malformed"},
		{change: "TICKET_TTL=721h", want: "TICKET_TTL (-ttl) is malformed"},
		{args: []string{"-ttl", "0s"}, want: "TICKET_TTL (-ttl) is malformed"},
		{change: "MAX_TICKETS=many", want: "MAX_TICKETS (-max-tickets) is malformed"},
		{change: "MAX_TICKETS=0", want: "MAX_TICKETS (-max-tickets) is malformed"},
		{change: "WECHAT_SCOPE=snsapi_login", want: "WECHAT_SCOPE (-scope) is malformed"},
		{change: "WECHAT_API_BASE=api.weixin.qq.com", want: "WECHAT_API_BASE is malformed"},
		{change: "WECHAT_OPEN_BASE=https://a b", want: "WECHAT_OPEN_BASE is malformed"},
		{change: "WECHAT_MP_BASE=x", want: "WECHAT_MP_BASE is malformed"},
		{args: []string{"-demo"}, want: "WECHAT_APPSECRET is set"},
		{args: []string{"-dmeo"}, want: "-dmeo"},
		{args: []string{"serve"}, want: `unknown argument "serve"`},
		{change: "ADDR=256.0.0.1:x", want: "ADDR (-addr)"},
	} {
		err := run(t.Context(), test.args, with(test.change), io.Discard)
		if err == nil || !strings.HasPrefix(err.Error(), test.want) && !strings.Contains(err.Error(), "defined: "+test.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s %q: %v, want one line that begins with %q", test.change, test.args, err, test.want)
			continue
		}
		if strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: the error tells the secret: %v", test.change, err)
		}
		if strings.Contains(test.want, "is not set") && !strings.Contains(err.Error(), "-demo") {
			t.Errorf("%s: no word of -demo: %v", test.change, err)
		}
	}
}

func TestSettings(t *testing.T) {
	c, err := parseConfig([]string{"-ttl", "90s"}, with("TICKET_TTL=2m", "MAX_TICKETS=7", "PUBLIC_URL=http://[::1]:8080/", "WECHAT_AES_KEY="+docKey, "WECHAT_API_BASE=http://127.0.0.1:9/api/"), io.Discard)
	must(t, err)
	if c.ttl != 90*time.Second || c.maxTickets != 7 || c.publicURL != "http://[::1]:8080" || c.aesKey == nil || c.apiBase != "http://127.0.0.1:9/api" ||
		c.openBase != "https://open.weixin.qq.com" || c.addr != ":8080" || c.scope != "snsapi_base" {
		t.Errorf("%+v", c)
	}
	if c, err := parseConfig([]string{"-demo"}, with("WECHAT_APPSECRET=", "PUBLIC_URL="), io.Discard); err != nil || c.addr != "127.0.0.1:8080" {
		t.Errorf("-demo listens on %q; %v", c.addr, err)
	}
}

func TestHelp(t *testing.T) {
	var out strings.Builder
	if _, err := parseConfig([]string{"-h"}, with(), &out); err != flag.ErrHelp {
		t.Error(err)
	}
	for _, want := range []string{"-demo", "PUBLIC_URL", "TICKET_TTL", "WECHAT_TOKEN"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("-h has no word of %s:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), goodSettings["WECHAT_APPSECRET"]) {
		t.Error("-h tells the secret")
	}
	must(t, run(t.Context(), []string{"-h"}, with(), io.Discard))
}

// start runs wxscan and returns its URL, once it listens. stop ends it.
func start(t *testing.T, getenv func(string) string, args ...string) (url string, logged *syncBuffer, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended, logged := make(chan error, 1), new(syncBuffer)
	go func() { ended <- run(ctx, args, getenv, io.MultiWriter(logged, t.Output())) }()
	stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	return listening(t, logged), logged, stop
}

var listeningLine = regexp.MustCompile(`msg=listening addr=(\S+)`)

func listening(t *testing.T, logged *syncBuffer) string {
	t.Helper()
	for range 1000 {
		if line := listeningLine.FindStringSubmatch(logged.String()); line != nil {
			return "http://" + line[1]
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("does not listen: %s", logged)
	return ""
}

func none(string) string { return "" }

func fetchJSON(t testing.TB, method, url string, v any) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if v != nil {
		if err := json.Unmarshal(body, v); err != nil {
			t.Fatalf("%s: %v in %.200q", url, err, body)
		}
	}
}

func TestEndToEnd(t *testing.T) {
	for _, settings := range [][]string{nil, {"WECHAT_AES_KEY=" + docKey}} {
		base, logged, stop := start(t, func(name string) string {
			if name == "WECHAT_AES_KEY" && settings != nil {
				return docKey
			}
			return ""
		}, "-demo", "-addr", "127.0.0.1:0")
		for _, begin := range []string{"getloginqr", "getauthqr"} {
			var qr qrAnswer
			fetchJSON(t, "GET", base+"/wechat/"+begin, &qr)
			if !strings.HasPrefix(qr.URL, base+"/demo/") {
				t.Errorf("the QR code says %q", qr.URL)
			}
			scanned := make(chan time.Time, 1)
			time.AfterFunc(50*time.Millisecond, func() {
				scanned <- time.Now()
				fetchJSON(t, "POST", base+"/demo/scan?openid=alice&ticket="+url.QueryEscape(qr.Ticket), nil)
			})
			var answer pollAnswer
			fetchJSON(t, "GET", base+"/wechat/checklogin?wait=25&ticket="+url.QueryEscape(qr.Ticket), &answer)
			if took := time.Since(<-scanned); !answer.Login || answer.OpenID != "alice" || took > time.Second {
				t.Errorf("%s: %+v, %v after the scan", begin, answer, took)
			}
		}
		if !strings.Contains(logged.String(), "ANYONE CAN LOG IN AS ANYONE") {
			t.Error("-demo does not say that anyone can log in as anyone")
		}
		must(t, stop())
	}
}

func TestNoSimulatorWithoutDemo(t *testing.T) {
	base, _, _ := start(t, with(), "-addr", "127.0.0.1:0")
	resp, err := http.Post(base+"/demo/scan?ticket=x&openid=mallory", "", nil)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("/demo/scan: %d", resp.StatusCode)
	}
}

func TestDemoOnEveryAddressWithAURL(t *testing.T) {
	base, _, _ := start(t, none, "-demo", "-addr", ":0", "-url", "http://192.168.7.7:8080")
	base = "http://127.0.0.1" + base[strings.LastIndex(base, ":"):]
	for _, begin := range []string{"getloginqr", "getauthqr"} {
		var qr qrAnswer
		fetchJSON(t, "GET", base+"/wechat/"+begin, &qr)
		if !strings.HasPrefix(qr.URL, "http://192.168.7.7:8080/demo/") {
			t.Errorf("the phone is sent to %q", qr.URL)
		}
		fetchJSON(t, "POST", base+"/demo/scan?openid=alice&ticket="+url.QueryEscape(qr.Ticket), nil)
		var answer pollAnswer
		fetchJSON(t, "GET", base+"/wechat/checklogin?ticket="+url.QueryEscape(qr.Ticket), &answer)
		if answer.OpenID != "alice" {
			t.Errorf("%s: %+v", begin, answer)
		}
	}
}

// build returns the path of the program, built.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wxscan")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func TestTermAnswersAThousandParkedPolls(t *testing.T) {
	logged := new(syncBuffer)
	cmd := exec.Command(build(t), "-demo", "-addr", "127.0.0.1:0")
	cmd.Stderr = logged
	must(t, cmd.Start())
	defer cmd.Process.Kill()
	base := listening(t, logged)
	const polls = 1000
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: polls}}
	answers := make(chan pollAnswer, polls)
	for range polls {
		var qr qrAnswer
		fetchJSON(t, "GET", base+"/wechat/getauthqr", &qr)
		go func() {
			var answer pollAnswer
			resp, err := client.Get(base + "/wechat/checklogin?wait=25&ticket=" + qr.Ticket)
			if err == nil {
				json.NewDecoder(resp.Body).Decode(&answer)
				resp.Body.Close()
			}
			answers <- answer
		}()
	}
	time.Sleep(500 * time.Millisecond) // let them park
	if len(answers) > 0 {
		t.Fatal("polls end before the signal")
	}
	begun := time.Now()
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err != nil || time.Since(begun) > 2*time.Second {
		t.Errorf("ended with %v after %v", err, time.Since(begun))
	}
	for range polls {
		if answer := <-answers; answer.Status != statusPending || answer.ExpiresIn < 200 {
			t.Fatalf("a parked poll is answered %+v", answer)
		}
	}
}

func TestShutdownWaitsForRequestsInFlight(t *testing.T) {
	release, arrived := make(chan bool), make(chan bool)
	slow := http.NewServeMux()
	slow.HandleFunc("/cgi-bin/stable_token", func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-release
		io.WriteString(w, `{"access_token":"t","expires_in":7200}`)
	})
	slow.HandleFunc("/cgi-bin/qrcode/create", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"ticket":"t","url":"u"}`)
	})
	weChat := newLocalServer(t, slow)
	base, _, stop := start(t, with("WECHAT_API_BASE="+weChat), "-addr", "127.0.0.1:0")
	status := make(chan int, 1)
	go func() {
		resp, err := http.Get(base + "/wechat/getloginqr")
		if err != nil {
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-arrived
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	must(t, stop())
	if got := <-status; got != 200 {
		t.Errorf("the request in flight ends with %d", got)
	}
}
