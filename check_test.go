package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// A fault is something wrong with a set-up, and what check has to say to it.
// In settings and lines, API and PUBLIC are the addresses of WeChat and of us.
type fault struct {
	name     string
	weChat   func(http.ResponseWriter, *http.Request) bool // sees a request of WeChat first; true if it answered
	server   http.HandlerFunc                              // answers instead of wxscan
	settings []string
	want     []string
}

// checked returns the lines of check.
func (f *fault) checked(t *testing.T, args []string, more ...string) (lines []string, err error) {
	t.Helper()
	w := newWorld(t, slices.DeleteFunc(slices.Clone(f.settings), func(s string) bool { return !strings.HasPrefix(s, "WECHAT_AES_KEY=") })...)
	api := newLocalServer(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if f.weChat == nil || !f.weChat(rw, r) {
			w.handler.ServeHTTP(rw, r)
		}
	}))
	public := newLocalServer(t, w.handler)
	if f.server != nil {
		public = newLocalServer(t, f.server)
	}
	addresses := strings.NewReplacer("API", api, "PUBLIC", public, "HTTPS", strings.Replace(public, "http:", "https:", 1))
	settings := slices.Concat(more, f.settings, []string{"WECHAT_APPID=" + demoAppID, "WECHAT_APPSECRET=" + testSecret,
		"WECHAT_TOKEN=" + testToken, "PUBLIC_URL=PUBLIC", "WECHAT_API_BASE=API/demo", "ADDR=" + strings.TrimPrefix(public, "http://")})
	getenv := func(name string) string {
		value := only(settings...)(name)
		if strings.HasSuffix(name, "URL") || strings.HasSuffix(name, "BASE") {
			value = addresses.Replace(value)
		}
		return value
	}
	var out strings.Builder
	err = run(t.Context(), append([]string{"check"}, args...), getenv, &out, io.Discard)
	for _, secret := range []string{testSecret, testToken, docKey, w.stableToken(t), "gQH/", "anotherToken", "signature="} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("check tells the secret %q: %s", secret, out.String())
		}
	}
	back := strings.NewReplacer(strings.Replace(public, "http:", "https:", 1), "HTTPS", public, "PUBLIC", api, "API")
	return strings.Split(strings.TrimSpace(back.Replace(out.String())), "\n"), err
}

// saying is WeChat, answering some calls: ends of paths, each with what is said.
func saying(pairs ...string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		for i := 0; i < len(pairs); i += 2 {
			if strings.HasSuffix(r.URL.Path, pairs[i]) {
				io.WriteString(w, pairs[i+1])
				return true
			}
		}
		return false
	}
}

// refusing is WeChat, refusing the calls whose path ends so.
func refusing(path string, code int, message string) func(http.ResponseWriter, *http.Request) bool {
	return saying(path, fmt.Sprintf(`{"errcode":%d,"errmsg":%q}`, code, message))
}

// page answers everything alike.
func page(status int, contentType, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if len(header) > 0 {
			w.Header().Set(header[0], header[1])
		}
		write(w, status, contentType, []byte(body))
	}
}

func hang(_ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // else the server does not see the client leave
	<-r.Context().Done()
}

func faults(t *testing.T) []fault {
	nobody := "http://" + freeAddress(t)
	secured := httptest.NewUnstartedServer(page(200, "", ""))
	secured.Config.ErrorLog = log.New(t.Output(), "", 0)
	secured.StartTLS()
	t.Cleanup(secured.Close)
	unknown := strings.Repeat("a", 64) + ".example" // too long a label to be asked for
	const account = "on the account's page (test account: https://mp.weixin.qq.com/debug/cgi-bin/sandbox?t=sandbox/login); without an account, try wxscan -demo"
	return []fault{
		{name: "a setting is missing", settings: []string{"WECHAT_APPID="}, want: []string{"✗ WECHAT_APPID is not set: it is the appID (wx and letters and digits) " + account}},
		{name: "a setting is malformed", settings: []string{"WECHAT_APPSECRET=hush hush"}, want: []string{"✗ WECHAT_APPSECRET is malformed: it is the appsecret (letters and digits) " + account}},

		{name: "the clock is slow", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Date", time.Now().Add(7*time.Minute).UTC().Format(http.TimeFormat))
			return false
		}, want: []string{"✗ this computer's clock and WeChat's are 7m0s apart: set it right (timedatectl set-ntp true); PUSH_MAX_SKEW bears 10m0s"}},
		{name: "the clock is fast for a strict setting", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Date", time.Now().Add(-3*time.Minute).UTC().Format(http.TimeFormat))
			return false
		}, settings: []string{"PUSH_MAX_SKEW=2m"}, want: []string{"✗ this computer's clock and WeChat's are 3m0s apart: set it right (timedatectl set-ntp true); PUSH_MAX_SKEW bears 2m0s"}},
		{name: "no time", weChat: func(w http.ResponseWriter, r *http.Request) bool { w.Header()["Date"] = nil; return false },
			want: []string{"✗ API does not tell the time: is that WeChat, or a proxy to it?"}},

		{name: "WeChat: refused", settings: []string{"WECHAT_API_BASE=" + nobody}, want: []string{"✗ " + nobody + ": connection refused: the server must be running, on that port, while check runs"}},
		{name: "WeChat: hangs", weChat: func(w http.ResponseWriter, r *http.Request) bool { hang(w, r); return true },
			want: []string{"✗ API: no answer in time: does a firewall or a security group (安全组) keep the port shut?"}},
		{name: "WeChat: hangs at a call", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "create") {
				hang(w, r)
			}
			return false
		}, want: []string{"✗ API: no answer in time: does a firewall or a security group (安全组) keep the port shut?"}},
		{name: "WeChat: not WeChat", weChat: saying("token", "<html>"), want: []string{`✗ API: no usable answer ("/cgi-bin/stable_token: no usable answer from WeChat: invalid character '<' looking for beginning of value"): is the address right, http or https, the certificate good, no proxy between?`}},
		{name: "WeChat: no access token", weChat: saying("token", "{}"), want: []string{`✗ API: no usable answer ("no usable answer from WeChat: no access_token"): is the address right, http or https, the certificate good, no proxy between?`}},

		{name: "busy", weChat: refusing("token", -1, "system error"), want: []string{"✗ errcode -1: WeChat is busy: try again later"}},
		{name: "appid", settings: []string{"WECHAT_APPID=wx1"}, want: []string{"✗ errcode 40013: set WECHAT_APPID to the appID on the account's page"}},
		{name: "appsecret", settings: []string{"WECHAT_APPSECRET=another"}, want: []string{"✗ errcode 40125: set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?"}},
		{name: "appsecret, by its other code", weChat: refusing("token", 40001, "invalid credential"), want: []string{"✗ errcode 40001: set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?"}},
		{name: "IP", weChat: refusing("token", 40164, "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist rid: 674a2f31-0c81d5b4-3e9d17a6"),
			want: []string{"✗ errcode 40164: add 203.0.113.7 to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; flow B works without"}},
		{name: "IPv6", weChat: refusing("token", 40164, "invalid ip 2001:db8::7, not in whitelist"),
			want: []string{"✗ errcode 40164: add 2001:db8::7 to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; flow B works without"}},
		{name: "IP untold", weChat: refusing("token", 89503, "confirm"), want: []string{"✗ errcode 89503: add this server's IP, which the errmsg names, to the account's IP whitelist (IP白名单); flow B works without"}},
		{name: "quota", weChat: refusing("token", 45009, "reach max api daily quota limit"), want: []string{"✗ errcode 45009: today's quota of this call is used up; it comes back at midnight in Beijing"}},
		{name: "pace", weChat: refusing("token", 45011, "api minute-quota reach limit"), want: []string{"✗ errcode 45011: too many calls in a short time: pause"}},
		{name: "unknown errcode", weChat: refusing("token", 99999, "secret "+testSecret), want: []string{"✗ errcode 99999: look it up among WeChat's return codes (全局返回码)"}},
		{name: "no right to QR codes", weChat: refusing("create", 48001, "api unauthorized"), want: []string{"✗ errcode 48001: this needs a verified service account (已认证的服务号) or a test account (测试号)"}},
		{name: "access tokens refused", weChat: refusing("create", 40001, "not latest"), want: []string{"✗ errcode 40001: WeChat refuses every access token: does another program fetch them for this appid with /cgi-bin/token?"}},

		{name: "DNS", settings: []string{"PUBLIC_URL=http://" + unknown}, want: []string{"✗ http://" + unknown + ": DNS does not know this name: is it spelt right, and this machine online?"}},
		{name: "not running", settings: []string{"PUBLIC_URL=" + nobody}, want: []string{"✗ " + nobody + ": connection refused: the server must be running, on that port, while check runs"}},
		{name: "hangs", server: hang, want: []string{"✗ PUBLIC: no answer in time: does a firewall or a security group (安全组) keep the port shut?"}},
		{name: "breaks off", server: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, want: []string{`✗ PUBLIC: no usable answer ("EOF"): is the address right, http or https, the certificate good, no proxy between?`}},
		{name: "https to http", settings: []string{"PUBLIC_URL=HTTPS"}, want: []string{`✗ HTTPS: no usable answer ("http: server gave HTTP response to HTTPS client"): is the address right, http or https, the certificate good, no proxy between?`}},
		{name: "http to https", settings: []string{"PUBLIC_URL=http" + strings.TrimPrefix(secured.URL, "https")}, want: []string{"✗ http" + strings.TrimPrefix(secured.URL, "https") + ": HTTP 400, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, to where it runs? Is it https there?"}},
		{name: "self-signed", settings: []string{"PUBLIC_URL=" + secured.URL}, want: []string{"✗ " + secured.URL + `: no usable answer ("tls: failed to verify certificate: x509: certificate signed by unknown authority"): is the address right, http or https, the certificate good, no proxy between?`}},
		{name: "redirect", server: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://user:hush@login.example.com"+r.URL.RequestURI(), http.StatusMovedPermanently)
		}, want: []string{`✗ PUBLIC redirects to "https://login.example.com/wechat/message", and WeChat does not follow: make PUBLIC_URL the address that answers itself`}},
		{name: "interstitial, for browsers", server: func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.UserAgent(), "Mozilla/") {
				page(200, "text/html", "<!doctype html>You are about to visit", "Ngrok-Error-Code", "ERR_NGROK_6024")(w, r)
			}
		},
			want: []string{"✗ PUBLIC answers with a web page: a tunnel's warning (ngrok, localtunnel), which WeChat cannot click away, or another program"}},
		{name: "another interstitial", server: page(511, "text/html; charset=utf-8", "<html>"),
			want: []string{"✗ PUBLIC answers with a web page: a tunnel's warning (ngrok, localtunnel), which WeChat cannot click away, or another program"}},
		{name: "nothing behind the proxy", server: page(502, "text/html", "<html>"),
			want: []string{"✗ PUBLIC: HTTP 502, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, to where it runs? Is it https there?"}},
		{name: "the echostr, but not raw", server: func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%q", r.FormValue("echostr")) },
			want: []string{"✗ PUBLIC: HTTP 200, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, to where it runs? Is it https there?"}},
		{name: "a proxy that does not say who asks", settings: []string{"ADDR=127.0.0.1:8080"}, want: []string{"✗ PUBLIC answers, but the proxy in front of it does not say who asks: " +
			"have it send X-Forwarded-For (nginx: proxy_set_header X-Forwarded-For $remote_addr), or QR_RATE takes all visitors for one"}},
		{name: "another Token, and a short one", settings: []string{"WECHAT_TOKEN=anotherToken"}, want: []string{"✗ PUBLIC: wxscan answers, but has another Token: start it with this WECHAT_TOKEN"}},
		{name: "a port that WeChat does not call", settings: []string{"WECHAT_API_BASE=https://" + unknown, "PUBLIC_URL=http://" + unknown + ":8080"}, want: []string{
			"✗ https://" + unknown + ": DNS does not know this name: is it spelt right, and this machine online?",
			"✗ http://" + unknown + ":8080: DNS does not know this name: is it spelt right, and this machine online?",
			"✗ WeChat pushes to ports 80 and 443 of public addresses alone, and http://" + unknown + ":8080 is none: flow A hears of no scan"}},
		{name: "an address that WeChat does not know", settings: []string{"WECHAT_API_BASE=https://" + unknown}, want: []string{
			"✗ https://" + unknown + ": DNS does not know this name: is it spelt right, and this machine online?",
			"✗ WeChat pushes to ports 80 and 443 of public addresses alone, and PUBLIC is none: flow A hears of no scan"}},
	}
}

func TestCheckSaysWhatIsWrongInBothLanguages(t *testing.T) {
	var mu sync.Mutex
	var said []string
	t.Run("faults", func(t *testing.T) {
		for _, fault := range faults(t) {
			t.Run(fault.name, func(t *testing.T) {
				t.Parallel()
				lines, err := fault.checked(t, nil)
				isGood := func(line string) bool { return !strings.HasPrefix(line, "✗") }
				if got := slices.DeleteFunc(slices.Clone(lines), isGood); !slices.Equal(got, fault.want) || err == nil || len(err.Error()) > 50 {
					t.Errorf("got\n%s\nwant\n%s\n%v", strings.Join(got, "\n"), strings.Join(fault.want, "\n"), err)
				}
				mu.Lock()
				said = append(said, lines...)
				mu.Unlock()
				if strings.Contains(fault.name, "hangs") {
					return // 5 seconds are enough
				}
				chinese, _ := fault.checked(t, nil, "LANG=zh_CN.UTF-8")
				for i, line := range chinese {
					if len(chinese) != len(lines) || line == lines[i] || !strings.ContainsFunc(line, func(r rune) bool { return unicode.Is(unicode.Han, r) }) {
						t.Errorf("in Chinese: %s", strings.Join(chinese, "\n"))
					}
				}
			})
		}
	})
	for _, text := range texts(t) {
		english, pattern := text[1], regexp.MustCompile(`%[sdvq]`).ReplaceAllString(regexp.QuoteMeta(text[1]), ".*")
		if !slices.ContainsFunc(said, regexp.MustCompile(pattern).MatchString) && !strings.Contains(english, "安全模式") {
			t.Errorf("no test brings about %q", english)
		}
		verbs := regexp.MustCompile(`%[a-z]`)
		if !slices.Equal(verbs.FindAllString(english, -1), verbs.FindAllString(text[2], -1)) {
			t.Errorf("%q has other arguments than %q", text[2], english)
		}
	}
}

func TestCheckOfAGoodSetUp(t *testing.T) {
	sealed := fault{settings: []string{"WECHAT_AES_KEY=" + docKey}}
	want := []string{
		"✓ the settings are complete and well-formed", "✓ this computer's clock agrees with WeChat's",
		"✓ WeChat gives an access token for this appid and appsecret", "✓ WeChat makes QR codes for this account (flow A)",
		"✓ PUBLIC answers WeChat's check of the interface URL",
		"→ to enter as the interface URL (接口配置信息 URL): PUBLIC/wechat/message ; as its Token: the value of WECHAT_TOKEN",
		"→ to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY",
		"→ to enter as the authorization domain (网页授权域名), which only a phone can try (flow B): 127.0.0.1"}
	if got, err := sealed.checked(t, nil); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
	}
	if got, err := sealed.checked(t, nil, "LANG=en_US.UTF-8", "LC_ALL=zh_TW.UTF-8"); err != nil || got[6] != "→ 并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值" {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
	}
	got, err := sealed.checked(t, []string{"-json"})
	must(t, err)
	var steps []string
	for i, line := range got {
		var step struct {
			Step, Message string
			OK            bool
		}
		must(t, json.Unmarshal([]byte(line), &step))
		if _, message, _ := strings.Cut(want[i], " "); !step.OK || step.Message != message {
			t.Errorf("-json: %s", line)
		}
		steps = append(steps, step.Step)
	}
	if got, want := strings.Join(steps, " "), "settings clock access_token qr_code public_url interface safe_mode authorization"; got != want {
		t.Errorf("steps %s, want %s", got, want)
	}
	bad := fault{server: http.NotFound}
	if got, err := bad.checked(t, []string{"-json"}); err == nil || !strings.Contains(strings.Join(got, ""), `"ok":false,"step":"public_url"`) {
		t.Errorf("%v: %s", err, got)
	}
}

// texts returns the texts of check's source, each in English and in Chinese.
func texts(t *testing.T) [][]string {
	t.Helper()
	source, err := os.ReadFile("check.go")
	must(t, err)
	literal := `"((?:[^"\\]|\\.)*)"`
	all := regexp.MustCompile(`\bsay\(.*"[✓✗→]",\s*`+literal+`,\s*`+literal+`[,)]`).FindAllStringSubmatch(string(source), -1)
	if calls := strings.Count(string(source), "say("); len(all) != calls-2 { // its own head, and the hints
		t.Errorf("%d texts of %d calls in check.go", len(all), calls)
	}
	for _, code := range []int{-1, 40013, 40125, 40001, 40164, 45009, 45011, 48001} {
		_, english, chinese := sorted(&apiError{code: code})
		all = append(all, []string{"", english, chinese})
	}
	return all
}

// curled returns the arguments of each curl line, as sh reads them.
func curled(t *testing.T, lines string) (calls [][]string) {
	t.Helper()
	cmd := exec.Command("sh")
	cmd.Dir = t.TempDir()
	cmd.Stdin = strings.NewReader("curl() { printf '%s\\0' \"$@\" END; }\n" + lines)
	out, err := cmd.Output()
	must(t, err)
	for call := range strings.SplitSeq(strings.TrimSuffix(string(out), "END\x00"), "END\x00") {
		calls = append(calls, strings.Split(strings.TrimSuffix(call, "\x00"), "\x00"))
	}
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) > 0 {
		t.Errorf("the lines do more than curl: %v, %v", left, err)
	}
	return calls
}

func TestSignedLinesLogIn(t *testing.T) {
	for _, settings := range [][]string{nil, {"WECHAT_AES_KEY=" + docKey}} {
		for i, openID := range []string{"o123", `'; touch x; "$(touch y)` + "`touch z`\\\n'&<]]>"} {
			w := newWorld(t, settings...)
			qr, event := w.begin(t, "getloginqr"), []string{"SCAN", "subscribe"}[i]
			getenv := with(append(settings, "WECHAT_TOKEN="+testToken, "ADDR=0.0.0.0:99")...)
			var out strings.Builder
			must(t, run(t.Context(), []string{"sign", "-ticket", qr.Ticket, "-openid", openID, "-event", event}, getenv, &out, io.Discard))
			calls := curled(t, out.String())
			if len(calls) != 2 || !strings.HasPrefix(calls[0][3], "http://127.0.0.1:99/wechat/message?") {
				t.Fatalf("%q", calls)
			}
			echo, err := url.Parse(calls[0][3])
			must(t, err)
			if got := w.do("GET", echo.RequestURI(), ""); got.Code != 200 || got.Body.String() != echo.Query().Get("echostr") {
				t.Errorf("the URL check: %d %s", got.Code, got.Body)
			}
			if got := w.do("POST", calls[1][3], calls[1][len(calls[1])-1]); got.Code != 200 {
				t.Errorf("the push: %d %s", got.Code, got.Body)
			}
			if answer := w.check(t, qr.Ticket, ""); answer.OpenID != openID {
				t.Errorf("logs in %q, want %q", answer.OpenID, openID)
			}
		}
	}
}

func TestSignSaysWhatIsMissing(t *testing.T) {
	for _, test := range []struct{ env, args, want string }{
		{"WECHAT_TOKEN=", "", "sign: WECHAT_TOKEN is not set: it must be the server's; that of wxscan -demo is simulated"},
		{"WECHAT_AES_KEY=short", "", "sign: WECHAT_AES_KEY is malformed: it must be the server's"},
		{"WECHAT_APPID=;WECHAT_AES_KEY=" + docKey, "", "sign: WECHAT_APPID is not set: what WECHAT_AES_KEY seals names it"},
		{"ADDR=unix:/run/wxscan.sock;PUBLIC_URL=", "", "sign: PUBLIC_URL is not set: it must be the server's"},
		{"", "-event follow", "sign: -event must be SCAN or subscribe"},
		{"", "-ticket T", "sign: -ticket and -openid go together, and neither is empty"},
		{"", "T", "sign: unknown argument (wxscan -h lists the flags)"},
		{"", "-tiket T", `unknown flag "-tiket": did you mean -ticket?`},
	} {
		var out strings.Builder
		err := run(t.Context(), append([]string{"sign"}, strings.Fields(test.args)...), with(strings.Split(test.env, ";")...), &out, io.Discard)
		if err == nil || err.Error() != test.want || out.Len() > 0 {
			t.Errorf("%s sign %s: %v %s, want %s", test.env, test.args, err, out.String(), test.want)
		}
	}
}

func TestUnknownWords(t *testing.T) {
	for args, want := range map[string]string{
		"chek": `unknown command "chek": did you mean check?`, "singn": `unknown command "singn": did you mean sign?`,
		"--version": `unknown flag "-version" (wxscan -h lists them)`, "vresion": `unknown command "vresion": did you mean version?`,
		"-ulr x": `unknown flag "-ulr": did you mean -url?`, "-json": `unknown flag "-json" (wxscan -h lists them)`,
		"": `unknown command "" (wxscan -h lists them)`, "-demo check": `unknown argument "check"; a command goes first (wxscan -h lists them)`,
	} {
		if err := run(t.Context(), strings.Split(args, " "), none, io.Discard, io.Discard); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", args, err, want)
		}
	}
}

func TestStartSaysWhatToEnter(t *testing.T) {
	const line = "interface_url=https://login.example.com/wechat/message authorization_domain=login.example.com"
	_, logged, _ := start(t, with(), "-addr", "127.0.0.1:0")
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(logged.String(), line) && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if strings.Count(logged.String(), line) != 1 {
		t.Errorf("no line to paste from, once: %s", logged)
	}
	_, logged, stop := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	must(t, stop())
	if strings.Contains(logged.String(), "interface_url") {
		t.Errorf("-demo tells what to enter: %s", logged)
	}
}

func TestCommandsOfTheProgram(t *testing.T) {
	path := build(t)
	base, _ := launch(t, path)
	env := append(os.Environ(), "LC_ALL=C", "WECHAT_APPID="+demoAppID, "WECHAT_APPSECRET=simulated", "WECHAT_TOKEN=simulated",
		"PUBLIC_URL="+base, "WECHAT_API_BASE="+base+"/demo", "ADDR="+strings.TrimPrefix(base, "http://"), "PATH="+filepath.Dir(path)+":"+os.Getenv("PATH"))
	execute := func(script string, more ...string) (stdout, stderr string, code int) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var out, errs strings.Builder
		cmd := exec.CommandContext(ctx, "sh", "-c", script)
		cmd.Env, cmd.Stdout, cmd.Stderr = append(slices.Clone(env), more...), &out, &errs
		cmd.Run()
		return out.String(), errs.String(), cmd.ProcessState.ExitCode()
	}
	if out, errs, code := execute("wxscan check"); code != 0 || strings.Count(out, "\n") != 8 || errs != "" {
		t.Errorf("check: %d %s%s", code, out, errs)
	}
	if out, errs, code := execute("wxscan check -demo", "WECHAT_APPSECRET=", "PUBLIC_URL=", "WECHAT_API_BASE="); code != 0 || strings.Count(out, "✓") != 5 {
		t.Errorf("check -demo: %d %s%s", code, out, errs)
	}
	out, errs, code := execute("wxscan check -json", "WECHAT_TOKEN=another")
	if code != 1 || strings.Count(out, `"ok":false`) != 1 || errs != "wxscan: check: not everything is in place\n" {
		t.Errorf("check of a fault: %d %s%s", code, out, errs)
	}
	for flags, server := range map[string][]string{"": nil, "-event subscribe": {"ADDR=unix:/run/wxscan.sock"}, "-event SCAN": {"ADDR=:1", "TLS_CERT=cert.pem"}} {
		program(t, "curl", "curl")
		qr := begun(t, base, "getloginqr")
		if out, errs, code := execute(`wxscan sign -ticket "$T" -openid o123 `+flags+` | sh`, append(server, "T="+qr.Ticket)...); code != 0 || !strings.Contains(out, "<xml>") {
			t.Errorf("sign: %d %s%s", code, out, errs)
		}
		if answer := polled(t, base, qr.Ticket, ""); answer.OpenID != "o123" {
			t.Errorf("sign | sh: %+v", answer)
		}
	}
	if out, errs, code := execute("wxscan version"); code != 0 || !regexp.MustCompile(`^wxscan \S+ ([0-9a-f]{12} )?go1\.\S+\n$`).MatchString(out) {
		t.Errorf("version: %d %s%s", code, out, errs)
	}
	for _, help := range []string{"-h", "help", "check -h", "sign --help"} {
		out, errs, code := execute("wxscan "+help, "PUBLIC_URL=", "ADDR=", "WECHAT_APPSECRET=hush", "SESSION_SECRET=hush", "METRICS_TOKEN=hush")
		if code != 0 || errs != "" || strings.Count(out, "\n") > 30 || strings.Contains(out, "hush") {
			t.Errorf("%s: %d %s%s", help, code, out, errs)
		}
		for _, want := range []string{"wxscan check [-json]", "PUBLIC_URL", "-demo", "TICKET_TTL", "WECHAT_TOKEN"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s has no word of %s: %s", help, want, out)
			}
		}
		for line := range strings.Lines(out) {
			if utf8.RuneCountInString(line) > 101 {
				t.Errorf("%s: too wide: %s", help, line)
			}
		}
	}
	if out, errs, code := execute("wxscan chek"); code != 1 || out != "" || errs != "wxscan: unknown command \"chek\": did you mean check?\n" {
		t.Errorf("chek: %d %s%s", code, out, errs)
	}
}

func TestCheckWarnsOfAShortToken(t *testing.T) {
	for language, want := range map[string]string{"en": "→ to make longer, here and there: WECHAT_TOKEN", "zh": "→ 请加长两处的 WECHAT_TOKEN"} {
		for token, warned := range map[string]bool{"a2345678901234b": true, "a2345678901234bc": false} {
			lines, _ := new(fault).checked(t, nil, "LANG="+language, "WECHAT_TOKEN="+token)
			if text := strings.Join(lines, "\n"); strings.Contains(text, want) != warned || strings.Contains(text, token) {
				t.Errorf("%d characters: %s", len(token), text)
			}
		}
	}
}
