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
	want     string // the lines with ✗, before the verdict
	broken   string // the flows that are not ready, by their letters
}

// checked returns the lines of check.
func (f *fault) checked(t *testing.T, args []string, more ...string) (lines []string, err error) {
	t.Helper()
	isOther := func(setting string) bool { return !strings.HasPrefix(setting, "WECHAT_AES_KEY=") }
	w := newWorld(t, slices.DeleteFunc(slices.Clone(f.settings), isOther)...)
	api := newLocalServer(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if f.weChat == nil || !f.weChat(rw, r) {
			w.handler.ServeHTTP(rw, r)
		}
	}))
	public := newLocalServer(t, w.handler)
	if f.server != nil {
		public = newLocalServer(t, f.server)
	}
	secured := strings.Replace(public, "http:", "https:", 1)
	addresses := strings.NewReplacer("API", api, "PUBLIC", public, "HTTPS", secured)
	settings := slices.Concat(more, f.settings, []string{"WECHAT_APPID=" + demoAppID, "WECHAT_APPSECRET=" + testSecret,
		"WECHAT_TOKEN=" + testToken, "PUBLIC_URL=PUBLIC", "WECHAT_API_BASE=API/demo",
		"ADDR=" + strings.TrimPrefix(public, "http://")})
	getenv := func(name string) string {
		value := only(settings...)(name)
		if strings.HasSuffix(name, "URL") || strings.HasSuffix(name, "BASE") {
			value = addresses.Replace(value)
		}
		return value
	}
	var out strings.Builder
	err = run(t.Context(), append([]string{"check"}, args...), getenv, &out, io.Discard)
	secrets := []string{testSecret, testToken, docKey, w.stableToken(t), "gQH/", "anotherToken", "signature="}
	for _, secret := range secrets {
		if strings.Contains(out.String(), secret) {
			t.Errorf("check tells the secret %q: %s", secret, out.String())
		}
	}
	back := strings.NewReplacer(secured, "HTTPS", public, "PUBLIC", api, "API")
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

// What check says of an address, after it.
const (
	refused  = ": connection refused: the server must be running, on that port, while check runs"
	timeout  = ": no answer in time: does a firewall or a security group (安全组) keep the port shut?"
	unusable = ": no usable answer (%q): is the address right, is it http or https, is a proxy between?"
	noName   = ": DNS does not know this name: is it spelt right, and this machine online?"
	badCert  = ": its certificate is not trusted, or not for this name, or has expired: " +
		"get one that browsers accept (certbot, Caddy)"
	webPage = " answers with a web page: a tunnel's warning (ngrok, localtunnel), which WeChat cannot click away, " +
		"or another program"
	notOurs = ": HTTP %d, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, " +
		"to where it runs? Is it https there?"
	portShut = "WeChat pushes to ports 80 and 443 of public addresses alone, and %s is none: flow A hears of no scan"
	apart    = "this computer's clock and WeChat's are %s apart: set it right (timedatectl set-ntp true); " +
		"PUSH_MAX_SKEW bears %s"
	addIP = "errcode 40164: add %s to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; " +
		"flow B works without"
)

func faults(t *testing.T) []fault {
	nobody := "http://" + freeAddress(t)
	secured := httptest.NewUnstartedServer(page(200, "", ""))
	secured.Config.ErrorLog = log.New(t.Output(), "", 0)
	secured.StartTLS()
	t.Cleanup(secured.Close)
	plain := "http" + strings.TrimPrefix(secured.URL, "https")
	unknown := strings.Repeat("a", 64) + ".example" // too long a label to be asked for
	clock := func(ahead time.Duration) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Date", time.Now().Add(ahead).UTC().Format(http.TimeFormat))
			return false
		}
	}
	return []fault{
		{name: "the clock is slow", weChat: clock(7 * time.Minute), broken: "A",
			want: fmt.Sprintf(apart, "7m0s", "10m0s")},
		{name: "the clock is fast for a strict setting", weChat: clock(-3 * time.Minute), broken: "A",
			settings: []string{"PUSH_MAX_SKEW=2m"}, want: fmt.Sprintf(apart, "3m0s", "2m0s")},
		{name: "no time", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header()["Date"] = nil
			return false
		}, want: "API does not tell the time: is that WeChat, or a proxy to it?"},

		{name: "WeChat: refused", settings: []string{"WECHAT_API_BASE=" + nobody}, broken: "AB",
			want: nobody + refused},
		{name: "WeChat: hangs", weChat: func(w http.ResponseWriter, r *http.Request) bool { hang(w, r); return true },
			broken: "AB", want: "API" + timeout},
		{name: "WeChat: hangs at a call", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "create") {
				hang(w, r)
			}
			return false
		}, broken: "AB", want: "API" + timeout},
		{name: "WeChat: not WeChat", weChat: saying("token", "<html>"), broken: "AB",
			want: "API" + fmt.Sprintf(unusable, "/cgi-bin/stable_token: no usable answer from WeChat: "+
				"invalid character '<' looking for beginning of value")},
		{name: "WeChat: no access token", weChat: saying("token", "{}"), broken: "AB",
			want: "API" + fmt.Sprintf(unusable, "no usable answer from WeChat: no access_token")},

		{name: "busy", weChat: refusing("token", -1, "system error"), broken: "A",
			want: "errcode -1: WeChat is busy: try again later"},
		{name: "appid", settings: []string{"WECHAT_APPID=wx1"}, broken: "AB",
			want: "errcode 40013: set WECHAT_APPID to the appID on the account's page"},
		{name: "appsecret", settings: []string{"WECHAT_APPSECRET=another"}, broken: "AB",
			want: "errcode 40125: set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?"},
		{name: "appsecret, by its other code", weChat: refusing("token", 40001, "invalid credential"), broken: "AB",
			want: "errcode 40001: set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?"},
		{name: "IP", weChat: refusing("token", 40164, "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, "+
			"not in whitelist rid: 674a2f31-0c81d5b4-3e9d17a6"), broken: "A", want: fmt.Sprintf(addIP, "203.0.113.7")},
		{name: "IPv6", weChat: refusing("token", 40164, "invalid ip 2001:db8::7, not in whitelist"), broken: "A",
			want: fmt.Sprintf(addIP, "2001:db8::7")},
		{name: "IP untold", weChat: refusing("token", 89503, "confirm"), broken: "A",
			want: "errcode 89503: add this server's IP, which the errmsg names, to the account's IP whitelist " +
				"(IP白名单); flow B works without"},
		{name: "quota", weChat: refusing("token", 45009, "reach max api daily quota limit"), broken: "A",
			want: "errcode 45009: today's quota of this call is used up; it comes back at midnight in Beijing"},
		{name: "pace", weChat: refusing("token", 45011, "api minute-quota reach limit"), broken: "A",
			want: "errcode 45011: too many calls in a short time: pause"},
		{name: "unknown errcode", weChat: refusing("token", 99999, "secret "+testSecret), broken: "A",
			want: "errcode 99999: look it up among WeChat's return codes (全局返回码)"},
		{name: "no right to QR codes", weChat: refusing("create", 48001, "api unauthorized"), broken: "AB",
			want: "errcode 48001: this needs a verified service account (已认证的服务号) or a test account (测试号)"},
		{name: "access tokens refused", weChat: refusing("create", 40001, "not latest"), broken: "A",
			want: "errcode 40001: WeChat refuses every access token: does another program fetch them for this appid " +
				"with /cgi-bin/token?"},

		{name: "DNS", settings: []string{"PUBLIC_URL=http://" + unknown}, broken: "AB",
			want: "http://" + unknown + noName},
		{name: "not running", settings: []string{"PUBLIC_URL=" + nobody}, broken: "AB", want: nobody + refused},
		{name: "hangs", server: hang, broken: "AB", want: "PUBLIC" + timeout},
		{name: "breaks off", broken: "AB",
			server: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			want:   "PUBLIC" + fmt.Sprintf(unusable, "EOF")},
		{name: "https to http", settings: []string{"PUBLIC_URL=HTTPS"}, broken: "AB",
			want: "HTTPS" + fmt.Sprintf(unusable, "http: server gave HTTP response to HTTPS client")},
		{name: "http to https", settings: []string{"PUBLIC_URL=" + plain}, broken: "AB",
			want: plain + fmt.Sprintf(notOurs, 400)},
		{name: "self-signed", settings: []string{"PUBLIC_URL=" + secured.URL}, broken: "AB",
			want: secured.URL + badCert},
		{name: "redirect", server: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://user:hush@login.example.com"+r.URL.RequestURI(), http.StatusMovedPermanently)
		}, broken: "AB", want: `PUBLIC redirects to "https://login.example.com/wechat/message", ` +
			"and WeChat does not follow: make PUBLIC_URL the address that answers itself"},
		{name: "interstitial, for browsers", server: func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.UserAgent(), "Mozilla/") {
				page(200, "text/html", "<!doctype html>You are about to visit",
					"Ngrok-Error-Code", "ERR_NGROK_6024")(w, r)
			}
		}, broken: "AB", want: "PUBLIC" + webPage},
		{name: "another interstitial", server: page(511, "text/html; charset=utf-8", "<html>"), broken: "AB",
			want: "PUBLIC" + webPage},
		{name: "nothing behind the proxy", server: page(502, "text/html", "<html>"), broken: "AB",
			want: "PUBLIC" + fmt.Sprintf(notOurs, 502)},
		{name: "the echostr, but not raw", server: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%q", r.FormValue("echostr"))
		}, broken: "AB", want: "PUBLIC" + fmt.Sprintf(notOurs, 200)},
		{name: "a proxy that does not say who asks", settings: []string{"ADDR=127.0.0.1:8080"},
			want: "PUBLIC answers, but the proxy in front of it does not say who asks: have it send X-Forwarded-For " +
				"(nginx: proxy_set_header X-Forwarded-For $remote_addr), or QR_RATE takes all visitors for one"},
		{name: "another Token, and a short one", settings: []string{"WECHAT_TOKEN=anotherToken"}, broken: "A",
			want: "PUBLIC: wxscan answers, but has another Token: start it with this WECHAT_TOKEN"},
		{name: "a port that WeChat does not call", broken: "AB",
			settings: []string{"WECHAT_API_BASE=https://" + unknown, "PUBLIC_URL=http://" + unknown + ":8080"},
			want: "https://" + unknown + noName + "\nhttp://" + unknown + ":8080" + noName +
				"\n" + fmt.Sprintf(portShut, "http://"+unknown+":8080")},
		{name: "an address that WeChat does not know", broken: "AB",
			settings: []string{"WECHAT_API_BASE=https://" + unknown},
			want:     "https://" + unknown + noName + "\n" + fmt.Sprintf(portShut, "PUBLIC")},
	}
}

// marked returns what follows a mark in lines, and joins it.
func marked(lines []string, mark string) string {
	var all []string
	for _, line := range lines {
		if text, ok := strings.CutPrefix(line, mark+" "); ok {
			all = append(all, text)
		}
	}
	return strings.Join(all, "\n")
}

func isHan(r rune) bool { return unicode.Is(unicode.Han, r) }

func TestCheckSaysWhatIsWrongInBothLanguages(t *testing.T) {
	for _, fault := range faults(t) {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			bad := []string{fault.want}
			for flow := range strings.SplitSeq(fault.broken, "") {
				bad = append(bad, flow+": not ready, see above")
			}
			want := strings.Join(bad, "\n")
			lines, err := fault.checked(t, nil)
			if got := marked(lines, "✗"); got != want || err == nil ||
				err.Error() != "check: not everything is in place" {
				t.Errorf("got\n%s\nwant\n%s\n%v", got, want, err)
			}
			if strings.Contains(fault.name, "hangs") {
				return // 5 seconds are enough
			}
			chinese, _ := fault.checked(t, nil, "LANG=zh_CN.UTF-8")
			for i, line := range chinese {
				if len(chinese) != len(lines) || line == lines[i] || !strings.ContainsFunc(line, isHan) ||
					strings.Contains(line, "%!") {
					t.Errorf("in Chinese: %s", strings.Join(chinese, "\n"))
				}
			}
		})
	}
}

func TestCheckSaysEverySettingThatIsWrong(t *testing.T) {
	wrong := fault{settings: []string{"WECHAT_APPID=", "WECHAT_APPSECRET=hush hush"}}
	want := []string{
		"✗ WECHAT_APPID: must be the appID on the account's page: wx, then letters and digits, but is not set",
		"✗ WECHAT_APPSECRET: must be the appsecret on the account's page: letters and digits, " +
			"got something else, which is not shown here",
		"– not tried, for want of settings: all the rest",
	}
	if got, err := wrong.checked(t, nil); err == nil || !slices.Equal(got, want) {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
	}
}

func TestCheckSaysWhatItSkips(t *testing.T) {
	for _, test := range []struct {
		settings []string
		weChat   func(http.ResponseWriter, *http.Request) bool
		want     string
	}{
		{settings: []string{"WECHAT_API_BASE=http://" + freeAddress(t)},
			want: "not tried, as WeChat does not answer: whether it gives access tokens and QR codes"},
		{weChat: refusing("token", 40164, "invalid ip"),
			want: "not tried, for want of an access token: whether WeChat makes QR codes"},
	} {
		fault := fault{settings: test.settings, weChat: test.weChat}
		if lines, _ := fault.checked(t, nil); marked(lines, "–") != test.want {
			t.Errorf("got\n%s\nwant a line\n%s", strings.Join(lines, "\n"), test.want)
		}
	}
}

func TestCheckOfAGoodSetUp(t *testing.T) {
	sealed := fault{settings: []string{"WECHAT_AES_KEY=" + docKey}}
	want := []string{
		"✓ the settings are complete and well-formed", "✓ this computer's clock agrees with WeChat's",
		"✓ WeChat gives an access token for this appid and appsecret",
		"✓ WeChat makes QR codes for this account (flow A)",
		"✓ PUBLIC answers WeChat's check of the interface URL",
		"→ to enter as the interface URL (接口配置信息 URL): PUBLIC/wechat/message ; as its Token: the value of WECHAT_TOKEN",
		"→ to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY",
		"→ to enter as the authorization domain (网页授权域名): 127.0.0.1",
		"✓ A: ready", "✓ B: ready, but only a phone can try the domain"}
	if got, err := sealed.checked(t, nil); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
	}
	got, err := sealed.checked(t, nil, "LANG=en_US.UTF-8", "LC_ALL=zh_TW.UTF-8")
	if err != nil || got[6] != "→ 并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值" {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
	}
	got, err = sealed.checked(t, []string{"-json"})
	must(t, err)
	var steps []string
	for i, line := range got {
		var step struct {
			Step, Message string
			OK, Skipped   bool
		}
		must(t, json.Unmarshal([]byte(line), &step))
		if _, message, _ := strings.Cut(want[i], " "); !step.OK || step.Skipped || step.Message != message {
			t.Errorf("-json: %s", line)
		}
		steps = append(steps, step.Step)
	}
	const wantSteps = "settings clock access_token qr_code public_url interface safe_mode authorization flow_a flow_b"
	if got := strings.Join(steps, " "); got != wantSteps {
		t.Errorf("steps %s, want %s", got, wantSteps)
	}
	bad := fault{server: http.NotFound}
	got, err = bad.checked(t, []string{"-json"})
	if err == nil || !strings.Contains(strings.Join(got, ""), `"ok":false,"skipped":false,"step":"public_url"`) {
		t.Errorf("%v: %s", err, got)
	}
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
	openIDs := []string{"o123", `'; touch x; "$(touch y)` + "`touch z`\\\n'&<]]>"}
	for _, settings := range [][]string{nil, {"WECHAT_AES_KEY=" + docKey}} {
		for i, event := range []string{"scan", "Subscribe"} {
			w := newWorld(t, settings...)
			qr := w.begin(t, "getloginqr")
			args := []string{"sign", "-ticket", qr.Ticket, "-openid", openIDs[i], "-event", event}
			var out strings.Builder
			must(t, run(t.Context(), args, with(append(settings, "WECHAT_TOKEN="+testToken)...), &out, io.Discard))
			calls := curled(t, out.String())
			if len(calls) != 2 {
				t.Fatalf("%q", calls)
			}
			echo, err := url.Parse(calls[0][3])
			must(t, err)
			got := w.do("GET", echo.RequestURI(), "")
			if got.Code != 200 || got.Body.String() != echo.Query().Get("echostr") {
				t.Errorf("the URL check: %d %s", got.Code, got.Body)
			}
			if got := w.do("POST", calls[1][3], calls[1][len(calls[1])-1]); got.Code != 200 {
				t.Errorf("the push: %d %s", got.Code, got.Body)
			}
			if answer := w.check(t, qr.Ticket, ""); answer.OpenID != openIDs[i] {
				t.Errorf("logs in %q, want %q", answer.OpenID, openIDs[i])
			}
		}
	}
}

func TestSignedLinesGoToTheServer(t *testing.T) {
	for _, test := range []struct{ env, args, want string }{
		{"", "", "http://127.0.0.1:8080"},
		{"ADDR=0.0.0.0:99", "", "http://127.0.0.1:99"},
		{"ADDR=127.0.0.7:99", "", "http://127.0.0.7:99"},
		{"ADDR=:99", "-addr [::1]:98", "http://[::1]:98"},
		{"PUBLIC_URL=", "", "http://127.0.0.1:8080"},
		{"TLS_CERT=cert.pem", "", "https://login.example.com"},
		{"ADDR=:99", "-url https://other.example.com", "https://other.example.com"},
	} {
		var out strings.Builder
		args := append([]string{"sign"}, strings.Fields(test.args)...)
		must(t, run(t.Context(), args, with(test.env), &out, io.Discard))
		if got := curled(t, out.String())[0][3]; !strings.HasPrefix(got, test.want+"/wechat/message?") {
			t.Errorf("%s sign %s: %s, want %s", test.env, test.args, got, test.want)
		}
	}
}

func TestSignSaysWhatIsWrong(t *testing.T) {
	for _, test := range []struct{ env, args, want string }{
		{"WECHAT_TOKEN=", "",
			"WECHAT_TOKEN: must be 3 to 32 letters and digits that you make up, as in 接口配置信息, but is not set"},
		{"WECHAT_AES_KEY=short", "",
			"WECHAT_AES_KEY: must be the EncodingAESKey: 43 letters and digits; unset: plain mode, " +
				"got something else, which is not shown here"},
		{"WECHAT_APPID=;WECHAT_AES_KEY=" + docKey, "",
			"WECHAT_APPID: must be the appID on the account's page: wx, then letters and digits, but is not set"},
		{"TLS_CERT=cert.pem;PUBLIC_URL=", "",
			"PUBLIC_URL (-url): must be http(s)://host[:port], no path, where phones reach us, but is not set"},
		{"", "-addr x", `ADDR (-addr): must be host:port to listen on, got "x"`},
		{"", "-event follow -ticket T", `-event: must be scan or subscribe, got "follow"` +
			"\n-ticket, -openid: must both be given, or neither"},
		{"", "T", `unknown argument "T": a command goes first, and a flag begins with -`},
		{"", "-tiket T", "unknown flag -tiket: there are -addr -env -event -openid -ticket -url"},
		{"LANG=zh_CN", "-event follow", `-event：应为 scan 或 subscribe，实际为 "follow"`},
	} {
		var out strings.Builder
		args := append([]string{"sign"}, strings.Fields(test.args)...)
		err := run(t.Context(), args, with(strings.Split(test.env, ";")...), &out, io.Discard)
		if err == nil || err.Error() != test.want || out.Len() > 0 {
			t.Errorf("%s sign %s: %v %s, want %s", test.env, test.args, err, out.String(), test.want)
		}
	}
}

func TestCommandsOfTheProgram(t *testing.T) {
	path := build(t)
	base, _ := launch(t, path)
	env := append(os.Environ(), "LC_ALL=C", "WECHAT_APPID="+demoAppID, "WECHAT_APPSECRET=simulated",
		"WECHAT_TOKEN=simulated", "PUBLIC_URL="+base, "WECHAT_API_BASE="+base+"/demo",
		"ADDR="+strings.TrimPrefix(base, "http://"), "PATH="+filepath.Dir(path)+":"+os.Getenv("PATH"))
	execute := func(script string, more ...string) (stdout, stderr string, code int) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var out, errs strings.Builder
		cmd := exec.CommandContext(ctx, "sh", "-c", script)
		cmd.Env, cmd.Stdout, cmd.Stderr = append(slices.Clone(env), more...), &out, &errs
		cmd.Run()
		return out.String(), errs.String(), cmd.ProcessState.ExitCode()
	}
	if out, errs, code := execute("wxscan check"); code != 0 || strings.Count(out, "\n") != 10 || errs != "" {
		t.Errorf("check: %d %s%s", code, out, errs)
	}
	out, errs, code := execute("wxscan check -demo", "WECHAT_APPSECRET=", "PUBLIC_URL=", "WECHAT_API_BASE=")
	if code != 0 || strings.Count(out, "✓") != 7 {
		t.Errorf("check -demo: %d %s%s", code, out, errs)
	}
	out, errs, code = execute("wxscan check -json", "WECHAT_TOKEN=another")
	if code != 1 || strings.Count(out, `"ok":false`) != 2 || errs != "wxscan: check: not everything is in place\n" {
		t.Errorf("check of a fault: %d %s%s", code, out, errs)
	}
	program(t, "curl", "curl")
	for flags, server := range map[string]string{
		"": "", "-event subscribe": "TLS_CERT=cert.pem", "-url " + base: "ADDR=:1"} {
		qr := begun(t, base, "getloginqr")
		out, errs, code := execute(`wxscan sign -ticket "$T" -openid o123 `+flags+` | sh`, server, "T="+qr.Ticket)
		if code != 0 || !strings.Contains(out, "<xml>") {
			t.Errorf("sign: %d %s%s", code, out, errs)
		}
		if answer := polled(t, base, qr.Ticket, ""); answer.OpenID != "o123" {
			t.Errorf("sign | sh: %+v", answer)
		}
	}
	version := regexp.MustCompile(`^wxscan \S+ ([0-9a-f]{12} )?go1\.\S+\n$`)
	for _, args := range []string{"version", "-version", "--version"} {
		if out, errs, code := execute("wxscan " + args); code != 0 || !version.MatchString(out) {
			t.Errorf("%s: %d %s%s", args, code, out, errs)
		}
	}
	out, errs, code = execute("wxscan", "WECHAT_APPID=", "PUBLIC_URL=")
	if code != 1 || out != "" || strings.Count(errs, "\n") != 3 || strings.Count(errs, "wxscan: ") != 3 {
		t.Errorf("without settings: %d %s%s, want three lines", code, out, errs)
	}
}

func TestEachCommandSaysWhatItTakes(t *testing.T) {
	all := []string{"PUBLIC_URL", "TICKET_TTL", "WECHAT_TOKEN", "SESSION_SECRET", "-env", "-demo", "-confirm"}
	for args, want := range map[string][]string{
		"-h": append(all, "-version"), "help": append(all, "wxscan check"), "-demo -h": all,
		"check -h":    append(all, "-json"),
		"sign --help": {"-ticket", "-openid", "-event", "-addr", "-url", "-env", "WECHAT_TOKEN", "WECHAT_AES_KEY"},
	} {
		for language, readme := range map[string]string{"en_GB.UTF-8": "README.md", "zh_CN.UTF-8": "README.zh-CN.md"} {
			var out strings.Builder
			getenv := only("LANG="+language, "WECHAT_APPSECRET=hush", "SESSION_SECRET=hush", "METRICS_TOKEN=hush")
			must(t, run(t.Context(), strings.Fields(args), getenv, &out, io.Discard))
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if !strings.Contains(lines[len(lines)-1], readme) || strings.Contains(out.String(), "hush") {
				t.Errorf("%s: %s", args, out.String())
			}
			for _, word := range want {
				if !strings.Contains(out.String(), word) {
					t.Errorf("%s has no word of %s: %s", args, word, out.String())
				}
			}
			for _, line := range lines {
				if utf8.RuneCountInString(line) > 100 {
					t.Errorf("%s: too wide: %s", args, line)
				}
			}
		}
	}
}

func TestCheckWarnsOfAShortToken(t *testing.T) {
	for language, want := range map[string]string{
		"en": "→ to make longer, here and there: WECHAT_TOKEN", "zh": "→ 请加长两处的 WECHAT_TOKEN"} {
		for token, warned := range map[string]bool{"a2345678901234b": true, "a2345678901234bc": false} {
			lines, _ := new(fault).checked(t, nil, "LANG="+language, "WECHAT_TOKEN="+token)
			text := strings.Join(lines, "\n")
			if strings.Contains(text, want) != warned || strings.Contains(text, token) {
				t.Errorf("%d characters: %s", len(token), text)
			}
		}
	}
}
