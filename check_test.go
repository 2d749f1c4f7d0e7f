package main

import (
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
	settings string                                        // separated by spaces
	broken   string                                        // the flows that are not ready, by their letters
	want     string                                        // how the lines with ✗ and – begin, before the verdict
}

// checked returns the lines of check.
func (f *fault) checked(t *testing.T, args []string, more ...string) (lines []string, err error) {
	t.Helper()
	w := newWorld(t, "WECHAT_AES_KEY="+only(strings.Fields(f.settings)...)("WECHAT_AES_KEY"))
	api := newLocalServer(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if f.weChat == nil || !f.weChat(rw, r) {
			w.handler.ServeHTTP(rw, r)
		}
	}))
	public := newLocalServer(t, w.handler)
	if f.server != nil {
		public = newLocalServer(t, f.server)
	}
	settings := slices.Concat(more, strings.Fields(f.settings), []string{"WECHAT_APPID=" + demoAppID,
		"WECHAT_APPSECRET=" + testSecret, "WECHAT_TOKEN=" + testToken, "PUBLIC_URL=" + public,
		"WECHAT_API_BASE=" + api + "/demo", "ADDR=" + strings.TrimPrefix(public, "http://")})
	var out strings.Builder
	err = run(t.Context(), append([]string{"check"}, args...), only(settings...), &out, io.Discard)
	secrets := []string{testSecret, testToken, docKey, w.stableToken(t), "gQH/", "anotherToken", "signature="}
	for _, secret := range secrets {
		if strings.Contains(out.String(), secret) {
			t.Errorf("check tells the secret %q: %s", secret, out.String())
		}
	}
	names := strings.NewReplacer(public, "PUBLIC", api, "API")
	return strings.Split(strings.TrimSpace(names.Replace(out.String())), "\n"), err
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
	const noWeChat = "\n– not tried, as WeChat does not answer: whether it gives access tokens and QR codes"
	const noToken = "\n– not tried, for want of an access token: whether WeChat makes QR codes"
	const proxy = "✗ PUBLIC answers, but the proxy in front of it does not say who asks: have it send X-Forwarded-For"
	const ports = "\n✗ WeChat pushes to ports 80 and 443 of public addresses alone, and "
	const redirect = `✗ PUBLIC redirects to "https://login.example.com/wechat/message", and`
	nobody := "http://" + freeAddress(t)
	secured := httptest.NewUnstartedServer(page(200, "", ""))
	secured.Config.ErrorLog = log.New(t.Output(), "", 0)
	secured.StartTLS()
	t.Cleanup(secured.Close)
	unknown := strings.Repeat("a", 64) + ".example" // too long a label to be asked for
	clock := func(ahead time.Duration) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Date", time.Now().Add(ahead).UTC().Format(http.TimeFormat))
			return false
		}
	}
	noDate := func(w http.ResponseWriter, r *http.Request) bool { w.Header()["Date"] = nil; return false }
	refused := func(code int, message string) func(http.ResponseWriter, *http.Request) bool {
		return refusing("create", code, message)
	}
	return []fault{
		{"settings", nil, nil, "WECHAT_APPID= WECHAT_APPSECRET=hush-hush", "", "✗ WECHAT_APPID: must be \n" +
			"✗ WECHAT_APPSECRET: must be \n– not tried, for want of settings: all the rest"},
		{"the clock is slow", clock(7 * time.Minute), nil, "", "A",
			"✗ this computer's clock and WeChat's are 7m0s apart"},
		{"the clock is fast for a strict setting", clock(-3 * time.Minute), nil, "PUSH_MAX_SKEW=2m", "A",
			"✗ this computer's clock and WeChat's are 3m0s apart"},
		{"no time", noDate, nil, "", "", "✗ API does not tell the time"},
		{"nothing listens", nil, nil, "WECHAT_API_BASE=" + nobody, "AB",
			"✗ " + nobody + ": connection refused" + noWeChat},
		{"both hang", func(w http.ResponseWriter, r *http.Request) bool { hang(w, r); return true }, hang, "", "AB",
			"✗ API: no answer in time" + noWeChat + "\n✗ PUBLIC: no answer in time"},
		{"not WeChat", saying("create", "<html>"), nil, "", "AB",
			`✗ API: no usable answer ("/cgi-bin/qrcode/create: no usable answer from WeChat: invalid character`},

		{"busy", refused(-1, "system error"), nil, "", "A", "✗ errcode -1: WeChat is busy"},
		{"appid", nil, nil, "WECHAT_APPID=wx1", "AB", "✗ errcode 40013: set WECHAT_APPID to" + noToken},
		{"IP", refused(40164, "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, rid: 674a2f31"), nil, "", "A",
			"✗ errcode 40164: add 203.0.113.7 to the account's IP whitelist: mp.weixin.qq.com,"},
		{"IPv6", refused(40164, "invalid ip 2001:db8::7, not in"), nil, "", "A",
			"✗ errcode 40164: add 2001:db8::7 to"},
		{"IPv4 in IPv6", refused(40164, "invalid ip ::ffff:203.0.113.7"), nil, "", "A",
			"✗ errcode 40164: add 203.0.113.7"},
		{"IP untold", refused(89503, "confirm"), nil, "", "A",
			"✗ errcode 89503: add this server's IP, which the errmsg names"},
		{"unknown errcode", refused(99999, "secret "+testSecret), nil, "", "A", "✗ errcode 99999: look it up"},
		{"no right to QR codes", refused(48001, "api unauthorized"), nil, "", "AB",
			"✗ errcode 48001: this needs a verified service account"},

		{"self-signed", nil, nil, "PUBLIC_URL=" + secured.URL, "AB",
			"✗ " + secured.URL + ": its certificate is not trusted"},
		{"redirect", nil, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://user:hush@login.example.com"+r.URL.RequestURI(), http.StatusMovedPermanently)
		}, "", "AB", redirect},
		{"interstitial, for browsers", nil, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.UserAgent(), "Mozilla/") {
				page(200, "text/html", "<!doctype html>You are about to visit")(w, r)
			}
		}, "", "AB", "✗ PUBLIC answers with a web page"},
		{"another", nil, page(511, "text/html; a=b", ""), "", "AB", "✗ PUBLIC answers with a web page"},
		{"nothing behind the proxy", nil, page(502, "text/html", "<html>"), "", "AB",
			"✗ PUBLIC: HTTP 502, but not from wxscan"},
		{"the echostr, but not raw", nil, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%q", r.FormValue("echostr"))
		}, "", "AB", "✗ PUBLIC: HTTP 200, but not from wxscan"},
		{"a proxy that does not say who asks", nil, nil, "ADDR=127.0.0.1:8080", "", proxy},
		{"another Token", nil, nil, "WECHAT_TOKEN=anotherToken", "A",
			"✗ PUBLIC: wxscan answers, but has another Token"},
		{"no name, and a port that WeChat does not call", nil, nil,
			"WECHAT_API_BASE=https://" + unknown + " PUBLIC_URL=http://" + unknown + ":8080", "AB",
			"✗ https://" + unknown + ": DNS does not know this name" + noWeChat +
				"\n✗ http://" + unknown + ":8080: DNS" + ports + "http://" + unknown + ":8080 is none"},
		{"an address that WeChat does not know", nil, nil, "WECHAT_API_BASE=https://" + unknown, "AB",
			"✗ https://" + unknown + ": DNS" + noWeChat + ports + "PUBLIC is none"},
	}
}

func isHan(r rune) bool { return unicode.Is(unicode.Han, r) }

func TestCheckSaysWhatIsWrongInBothLanguages(t *testing.T) {
	t.Parallel()
	for _, fault := range faults(t) {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			want := strings.Split(fault.want, "\n")
			for _, flow := range fault.broken {
				want = append(want, "✗ "+string(flow)+": not ready, see above")
			}
			lines, err := fault.checked(t, nil)
			got := slices.DeleteFunc(slices.Clone(lines), func(line string) bool {
				return !strings.HasPrefix(line, "✗ ") && !strings.HasPrefix(line, "– ")
			})
			if !slices.EqualFunc(got, want, strings.HasPrefix) ||
				err == nil || err.Error() != "check: not everything is in place" {
				t.Errorf("%v, got\n%s\nwant\n%s", err, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if fault.name == "both hang" {
				return // 10 seconds are enough
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

func TestCheckOfAGoodSetUp(t *testing.T) {
	sealed := fault{settings: "WECHAT_AES_KEY=" + docKey}
	want := []string{
		"settings: ✓ the settings are complete and well-formed",
		"clock: ✓ this computer's clock agrees with WeChat's",
		"access_token: ✓ WeChat gives an access token for this appid and appsecret",
		"qr_code: ✓ WeChat makes QR codes for this account (flow A)",
		"public_url: ✓ PUBLIC answers WeChat's check of the interface URL",
		"interface: → to enter as the interface URL (接口配置信息 URL): PUBLIC/wechat/message ; " +
			"as its Token: the value of WECHAT_TOKEN",
		"safe_mode: → to choose and enter there: safe mode (安全模式), " +
			"as EncodingAESKey the value of WECHAT_AES_KEY",
		"authorization: → to enter as the authorization domain (网页授权域名): 127.0.0.1",
		"flow_a: ✓ A: ready", "flow_b: ✓ B: ready, but only a phone can try the domain"}
	lines, err := sealed.checked(t, nil)
	must(t, err)
	objects, err := sealed.checked(t, []string{"-json"})
	must(t, err)
	for i, want := range want {
		step, line, _ := strings.Cut(want, ": ")
		_, message, _ := strings.Cut(line, " ")
		equal(t, step, lines[i], line)
		equal(t, step, objects[i], fmt.Sprintf(`{"message":%q,"ok":true,"skipped":false,"step":%q}`, message, step))
	}
	equal(t, "lines", len(lines)+len(objects), 2*len(want))
	wrong := fault{settings: "WECHAT_APPID="}
	objects, _ = wrong.checked(t, []string{"-json"})
	equal(t, "not tried", objects[1], `{"message":"not tried, for want of settings: all the rest",`+
		`"ok":true,"skipped":true,"step":"others"}`)
	chinese, _ := sealed.checked(t, nil, "LANG=en_US.UTF-8", "LC_ALL=zh_TW.UTF-8")
	equal(t, "in Chinese", chinese[6], "→ 并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值")
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
	openIDs := []string{"o123", `'; touch x; "$(touch y)` + "`touch z`\\n'&<]]>"}
	for _, key := range []string{"", docKey} {
		for i, event := range []string{"scan", "Subscribe"} {
			w := newWorld(t, "WECHAT_AES_KEY="+key)
			qr := w.begin(t, "getloginqr")
			var out strings.Builder
			must(t, run(t.Context(), []string{"sign", "-ticket", qr.Ticket, "-openid", openIDs[i], "-event", event},
				with("WECHAT_AES_KEY="+key, "WECHAT_TOKEN="+testToken), &out, io.Discard))
			calls := curled(t, out.String())
			echo, err := url.Parse(calls[0][3])
			must(t, err)
			equal(t, "the URL check", w.do("GET", echo.RequestURI(), "").Body.String(), echo.Query().Get("echostr"))
			w.do("POST", calls[1][3], calls[1][len(calls[1])-1])
			equal(t, "logged in", w.check(t, qr.Ticket, "").OpenID, openIDs[i])
			equal(t, "lines", len(calls), 2)
		}
	}
}

func TestSignGoesToTheServerOrSaysWhatIsWrong(t *testing.T) {
	for _, test := range []struct{ env, args, want string }{
		{"PUBLIC_URL=", "", "http://127.0.0.1:8080/wechat/message?"},
		{"ADDR=0.0.0.0:99", "", "http://127.0.0.1:99/wechat/message?"},
		{"ADDR=:99", "-addr [::1]:98", "http://[::1]:98/wechat/message?"},
		{"TLS_CERT=cert.pem", "", "https://login.example.com/wechat/message?"},
		{"ADDR=:99", "-tls-cert cert.pem", "https://login.example.com/wechat/message?"},
		{"ADDR=no.such.host:x;WECHAT_APPID=x", "-url https://other.example.com", // what it needs not may be wrong
			"https://other.example.com/wechat/message?"},

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
		got := fmt.Sprint(err)
		if err == nil {
			got = curled(t, out.String())[0][3]
		}
		if !strings.HasPrefix(got, test.want) || err != nil && out.Len() > 0 {
			t.Errorf("%s sign %s: %s, want %s", test.env, test.args, got, test.want)
		}
	}
}

func TestCommandsOfTheProgram(t *testing.T) {
	path := build(t)
	program(t, "curl", "curl")
	base, _ := launch(t, path)
	qr := begun(t, base, "getloginqr")
	env := append(os.Environ(), "LC_ALL=C", "WECHAT_APPID="+demoAppID, "WECHAT_APPSECRET=simulated",
		"WECHAT_TOKEN=simulated", "PUBLIC_URL="+base, "WECHAT_API_BASE="+base+"/demo", "T="+qr.Ticket,
		"ADDR="+strings.TrimPrefix(base, "http://"), "PATH="+filepath.Dir(path)+":"+os.Getenv("PATH"))
	const verdict = "wxscan: check: not everything is in place\n"
	for _, test := range []struct {
		script      string
		code        int
		out, stderr string // patterns
	}{
		{"wxscan check", 0, `^(.*\n){10}$`, `^$`},
		{"WECHAT_APPSECRET= PUBLIC_URL= WECHAT_API_BASE= wxscan check -demo", 0, `^([✓→] .*\n){9}$`, `^$`},
		{"WECHAT_TOKEN=another wxscan check -json", 1, `^(?s)(.*"ok":false){2}`, "^" + verdict + "$"},
		{"wxscan version", 0, `^wxscan \S+ ([0-9a-f]{12} )?go1\.\S+\n$`, `^$`},
		{"wxscan -version && wxscan --version", 0, `^(wxscan .*\n){2}$`, `^$`},
		{"WECHAT_APPID= PUBLIC_URL= wxscan", 1, `^$`, `^(wxscan: .*\n){3}$`},
		{`wxscan sign -ticket "$T" -openid o123 | sh`, 0, `^\S+\nsuccess|^\S+\n<xml>`, `^$`},
	} {
		var out, stderr strings.Builder
		cmd := exec.CommandContext(t.Context(), "sh", "-c", test.script)
		cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &stderr
		cmd.Run()
		if cmd.ProcessState.ExitCode() != test.code || !regexp.MustCompile(test.out).MatchString(out.String()) ||
			!regexp.MustCompile(test.stderr).MatchString(stderr.String()) {
			t.Errorf("%s: %v\n%s%s", test.script, cmd.ProcessState, out.String(), stderr.String())
		}
	}
	equal(t, "logged in by curl", polled(t, base, qr.Ticket, "").OpenID, "o123")
}

func TestEachCommandSaysWhatItTakes(t *testing.T) {
	const all = "PUBLIC_URL TICKET_TTL WECHAT_TOKEN SESSION_SECRET -env -demo -confirm "
	for args, want := range map[string]string{
		"-h": all + "-version", "help": all + "-version", "-demo -h": all + "-version", "check -h": all + "-json",
		"sign --help": "-ticket -openid -code -event -addr -url -tls-cert -env WECHAT_TOKEN WECHAT_AES_KEY",
	} {
		for language, readme := range map[string]string{"en_GB.UTF-8": "README.md", "zh_CN.UTF-8": "README.zh-CN.md"} {
			var out strings.Builder
			getenv := only("LANG="+language, "WECHAT_APPSECRET=hush", "SESSION_SECRET=hush", "METRICS_TOKEN=hush")
			must(t, run(t.Context(), strings.Fields(args), getenv, &out, io.Discard))
			for _, word := range append(strings.Fields(want), readme) {
				if !strings.Contains(out.String(), word) || strings.Contains(out.String(), "hush") {
					t.Errorf("%s has no word of %s, or a secret: %s", args, word, out.String())
				}
			}
			for line := range strings.Lines(out.String()) {
				if utf8.RuneCountInString(line) > 101 {
					t.Errorf("%s: too wide: %s", args, line)
				}
			}
		}
	}
}
