package main

import (
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
	want     string // how the lines with ✗ begin, before the verdict
	broken   string // the flows that are not ready, by their letters
	skipped  string // the lines with –
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

func faults(t *testing.T) []fault {
	const noWeChat = "not tried, as WeChat does not answer: whether it gives access tokens and QR codes"
	const noToken = "not tried, for want of an access token: whether WeChat makes QR codes"
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
	setting := func(settings ...string) []string { return settings }
	return []fault{
		{name: "the clock is slow", weChat: clock(7 * time.Minute), broken: "A",
			want: "this computer's clock and WeChat's are 7m0s apart"},
		{name: "the clock is fast for a strict setting", weChat: clock(-3 * time.Minute), broken: "A",
			settings: setting("PUSH_MAX_SKEW=2m"), want: "this computer's clock and WeChat's are 3m0s apart"},
		{name: "no time", weChat: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header()["Date"] = nil
			return false
		}, want: "API does not tell the time"},

		{name: "WeChat: refused", settings: setting("WECHAT_API_BASE=" + nobody), broken: "AB",
			want:    nobody + ": connection refused",
			skipped: noWeChat},
		{name: "WeChat: hangs", weChat: func(w http.ResponseWriter, r *http.Request) bool { hang(w, r); return true },
			broken: "AB", want: "API: no answer in time",
			skipped: noWeChat},
		{name: "WeChat: not WeChat", weChat: saying("create", "<html>"), broken: "AB",
			want: `API: no usable answer ("/cgi-bin/qrcode/create: no usable answer from WeChat: invalid character`},

		{name: "busy", weChat: refusing("create", -1, "system error"), broken: "A", want: "errcode -1: WeChat is busy"},
		{name: "appid", settings: setting("WECHAT_APPID=wx1"), broken: "AB", want: "errcode 40013: set WECHAT_APPID to",
			skipped: noToken},
		{name: "appsecret", settings: setting("WECHAT_APPSECRET=another"), broken: "AB",
			want:    "errcode 40125: set WECHAT_APPSECRET to",
			skipped: noToken},
		{name: "IP", weChat: refusing("create", 40164, "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, rid: 674a2f31"),
			broken: "A", want: "errcode 40164: add 203.0.113.7 to the account's IP whitelist: mp.weixin.qq.com,"},
		{name: "IPv6", weChat: refusing("create", 40164, "invalid ip 2001:db8::7, not in whitelist"), broken: "A",
			want: "errcode 40164: add 2001:db8::7 to"},
		{name: "IP untold", weChat: refusing("create", 89503, "confirm"), broken: "A",
			want: "errcode 89503: add this server's IP, which the errmsg names"},
		{name: "unknown errcode", weChat: refusing("create", 99999, "secret "+testSecret), broken: "A",
			want: "errcode 99999: look it up"},
		{name: "no right to QR codes", weChat: refusing("create", 48001, "api unauthorized"), broken: "AB",
			want: "errcode 48001: this needs a verified service account"},
		{name: "access tokens refused", weChat: refusing("create", 40001, "not latest"), broken: "A",
			want: "errcode 40001: WeChat refuses every access token"},

		{name: "not running", settings: setting("PUBLIC_URL=" + nobody), broken: "AB",
			want: nobody + ": connection refused"},
		{name: "hangs", server: hang, broken: "AB", want: "PUBLIC: no answer in time"},
		{name: "https to http", settings: setting("PUBLIC_URL=HTTPS"), broken: "AB",
			want: `HTTPS: no usable answer ("http: server gave HTTP response to HTTPS client")`},
		{name: "http to https", settings: setting("PUBLIC_URL=" + plain), broken: "AB",
			want: plain + ": HTTP 400, but not from wxscan"},
		{name: "self-signed", settings: setting("PUBLIC_URL=" + secured.URL), broken: "AB",
			want: secured.URL + ": its certificate is not trusted"},
		{name: "redirect", server: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://user:hush@login.example.com"+r.URL.RequestURI(), http.StatusMovedPermanently)
		}, broken: "AB", want: `PUBLIC redirects to "https://login.example.com/wechat/message", and`},
		{name: "interstitial, for browsers", server: func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.UserAgent(), "Mozilla/") {
				page(200, "text/html", "<!doctype html>You are about to visit")(w, r)
			}
		}, broken: "AB", want: "PUBLIC answers with a web page"},
		{name: "another interstitial", server: page(511, "text/html; charset=utf-8", "<html>"), broken: "AB",
			want: "PUBLIC answers with a web page"},
		{name: "nothing behind the proxy", server: page(502, "text/html", "<html>"), broken: "AB",
			want: "PUBLIC: HTTP 502, but not from wxscan"},
		{name: "the echostr, but not raw", server: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%q", r.FormValue("echostr"))
		}, broken: "AB", want: "PUBLIC: HTTP 200, but not from wxscan"},
		{name: "a proxy that does not say who asks", settings: setting("ADDR=127.0.0.1:8080"),
			want: "PUBLIC answers, but the proxy in front of it does not say who asks: have it send X-Forwarded-For"},
		{name: "another Token", settings: setting("WECHAT_TOKEN=anotherToken"), broken: "A",
			want: "PUBLIC: wxscan answers, but has another Token"},
		{name: "no name, and a port that WeChat does not call", broken: "AB",
			settings: setting("WECHAT_API_BASE=https://"+unknown, "PUBLIC_URL=http://"+unknown+":8080"),
			want: "https://" + unknown + ": DNS does not know this name\nhttp://" + unknown + ":8080: DNS does not\n" +
				"WeChat pushes to ports 80 and 443 of public addresses alone, and http://" + unknown + ":8080 is none",
			skipped: noWeChat},
		{name: "an address that WeChat does not know", broken: "AB",
			settings: setting("WECHAT_API_BASE=https://" + unknown),
			want:     "https://" + unknown + ": DNS\nWeChat pushes to ports 80 and 443 of public addresses alone",
			skipped:  noWeChat},
	}
}

// marked returns what follows a mark in lines.
func marked(lines []string, mark string) (all []string) {
	for _, line := range lines {
		if text, ok := strings.CutPrefix(line, mark+" "); ok {
			all = append(all, text)
		}
	}
	return all
}

func isHan(r rune) bool { return unicode.Is(unicode.Han, r) }

func TestCheckSaysWhatIsWrongInBothLanguages(t *testing.T) {
	for _, fault := range faults(t) {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			want := strings.Split(fault.want, "\n")
			for _, flow := range fault.broken {
				want = append(want, string(flow)+": not ready, see above")
			}
			lines, err := fault.checked(t, nil)
			got := marked(lines, "✗")
			if !slices.EqualFunc(got, want, strings.HasPrefix) ||
				err == nil || err.Error() != "check: not everything is in place" {
				t.Errorf("%v, got\n%s\nwant\n%s", err, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if skipped := strings.Join(marked(lines, "–"), "\n"); skipped != fault.skipped {
				t.Errorf("skipped %q, want %q", skipped, fault.skipped)
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
	want := []string{"✗ WECHAT_APPID: must be ", "✗ WECHAT_APPSECRET: must be ",
		"– not tried, for want of settings: all the rest"}
	if got, err := wrong.checked(t, nil); err == nil || !slices.EqualFunc(got, want, strings.HasPrefix) {
		t.Errorf("%v:\n%s", err, strings.Join(got, "\n"))
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
		var step struct{ Step, Message string }
		must(t, json.Unmarshal([]byte(line), &step))
		_, message, _ := strings.Cut(want[i], " ")
		if !strings.HasPrefix(line, `{"message":"`) || step.Message != message ||
			!strings.Contains(line, `"ok":true,"skipped":false`) {
			t.Errorf("-json: %s", line)
		}
		steps = append(steps, step.Step)
	}
	const wantSteps = "settings clock access_token qr_code public_url interface safe_mode authorization flow_a flow_b"
	if got := strings.Join(steps, " "); got != wantSteps {
		t.Errorf("steps %s, want %s", got, wantSteps)
	}
	for token, isShort := range map[string]bool{"a2345678901234b": true, "a2345678901234bc": false} {
		lines, _ := new(fault).checked(t, nil, "WECHAT_TOKEN="+token)
		text := strings.Join(lines, "\n")
		if strings.Contains(text, "→ to make longer, here and there: WECHAT_TOKEN") != isShort ||
			strings.Contains(text, token) {
			t.Errorf("%d characters: %s", len(token), text)
		}
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
			echo, err := url.Parse(calls[0][3])
			must(t, err)
			got := w.do("GET", echo.RequestURI(), "")
			if got.Code != 200 || got.Body.String() != echo.Query().Get("echostr") {
				t.Errorf("the URL check: %d %s", got.Code, got.Body)
			}
			w.do("POST", calls[1][3], calls[1][len(calls[1])-1])
			if answer := w.check(t, qr.Ticket, ""); answer.OpenID != openIDs[i] || len(calls) != 2 {
				t.Errorf("%d lines log in %q, want %q", len(calls), answer.OpenID, openIDs[i])
			}
		}
	}
}

func TestSignedLinesGoToTheServer(t *testing.T) {
	for _, test := range []struct{ env, args, want string }{
		{"PUBLIC_URL=", "", "http://127.0.0.1:8080"},
		{"ADDR=0.0.0.0:99", "", "http://127.0.0.1:99"},
		{"ADDR=:99", "-addr [::1]:98", "http://[::1]:98"},
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
		{"WECHAT_TOKEN=", "", "WECHAT_TOKEN: must be 3 to 32 letters"},
		{"WECHAT_AES_KEY=short", "", "WECHAT_AES_KEY: must be the EncodingAESKey"},
		{"WECHAT_APPID=;WECHAT_AES_KEY=" + docKey, "", "WECHAT_APPID: must be the appID"},
		{"TLS_CERT=cert.pem;PUBLIC_URL=", "", "PUBLIC_URL (-url): must be http(s)://host[:port]"},
		{"", "-addr x", `ADDR (-addr): must be host:port to listen on, got "x"`},
		{"", "-event follow -ticket T", `-event: must be scan or subscribe, got "follow"` +
			"\n-ticket, -openid: must both be given, or neither"},
		{"LANG=zh_CN", "-event follow", `-event：应为 scan 或 subscribe，实际为 "follow"`},
	} {
		var out strings.Builder
		args := append([]string{"sign"}, strings.Fields(test.args)...)
		err := run(t.Context(), args, with(strings.Split(test.env, ";")...), &out, io.Discard)
		if !strings.HasPrefix(fmt.Sprint(err), test.want) || out.Len() > 0 {
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
		var out, errs strings.Builder
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
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
	program(t, "curl", "curl")
	qr := begun(t, base, "getloginqr")
	out, errs, _ = execute(`wxscan sign -ticket "$T" -openid o123 | sh`, "T="+qr.Ticket)
	if answer := polled(t, base, qr.Ticket, ""); answer.OpenID != "o123" {
		t.Errorf("sign | sh: %+v, %s%s", answer, out, errs)
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
