package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The account of newWorld, and the queries that name it.
const (
	demoAppID   = "wx0123456789abcdef"
	demoAccount = "appid=" + demoAppID + "&secret=" + testSecret
)

// ask makes a call of the simulator's API. Like WeChat's, its answers, and its
// refusals too, are JSON that calls itself text/plain.
func (w *world) ask(t testing.TB, method, call, body string) (got answer) {
	t.Helper()
	out := w.do(method, "/demo"+call, body)
	must(t, json.Unmarshal(out.Body.Bytes(), &got))
	if contentType := out.Header().Get("Content-Type"); out.Code != 200 || contentType != "text/plain" {
		t.Errorf("%s: %d %s", call, out.Code, contentType)
	}
	return got
}

func stableBody(appID, secret string) string {
	return fmt.Sprintf(`{"grant_type":"client_credential","appid":%q,"secret":%q}`, appID, secret)
}

func (w *world) stableToken(t testing.TB) string {
	t.Helper()
	return w.ask(t, "POST", "/cgi-bin/stable_token", stableBody(demoAppID, testSecret)).AccessToken
}

func (w *world) plainToken(t testing.TB) string {
	t.Helper()
	return w.ask(t, "GET", "/cgi-bin/token?grant_type=client_credential&"+demoAccount, "").AccessToken
}

func createBody(action, scene string, seconds int) string {
	const body = `{"expire_seconds":%d,"action_name":%q,"action_info":{"scene":{"scene_str":%q}}}`
	return fmt.Sprintf(body, seconds, action, scene)
}

// create asks for a QR code of a minute, with an access token.
func (w *world) create(t testing.TB, token string) answer {
	t.Helper()
	call := "/cgi-bin/qrcode/create?access_token=" + url.QueryEscape(token)
	return w.ask(t, "POST", call, createBody("QR_STR_SCENE", "s", 60))
}

// press opens a link on the simulated phone and presses a button there.
func (w *world) press(link, openID, event string) *httptest.ResponseRecorder {
	link, _, _ = strings.Cut(link, "#")
	return w.submit(link, "openid", openID, "event", event)
}

// code returns the OAuth code that the authorize page gives to openID.
func (w *world) code(t testing.TB, openID, event string) string {
	t.Helper()
	out := w.press(w.begin(t, "getauthqr").URL, openID, event)
	back, err := url.Parse(out.Header().Get("Location"))
	must(t, err)
	if out.Code != http.StatusSeeOther || back.Path != "/wechat/accessusercode" || back.Query().Get("code") == "" {
		t.Fatalf("the authorize page answers %d, %s", out.Code, back)
	}
	return back.Query().Get("code")
}

func (w *world) exchange(t testing.TB, code string) answer {
	t.Helper()
	return w.ask(t, "GET", "/sns/oauth2/access_token?grant_type=authorization_code&"+demoAccount+"&code="+code, "")
}

func TestSimulatorRefusesWhatWeChatRefuses(t *testing.T) {
	w := newWorld(t)
	token, user := w.stableToken(t), w.exchange(t, w.code(t, "alice", "allow")).AccessToken
	const stable, plain, create = "/cgi-bin/stable_token", "/cgi-bin/token?", "/cgi-bin/qrcode/create?access_token="
	const oauth, profile = "/sns/oauth2/access_token?code=x&", "/sns/userinfo?access_token="
	const appID, secret = "appid=" + demoAppID, "&secret=" + testSecret
	good, long := createBody("QR_STR_SCENE", "s", 60), strings.Repeat("s", 64)
	with := create + url.QueryEscape(token)
	for _, test := range []struct {
		name, method, call, body string
		errcode                  int
	}{
		{"stable token: wrong appid", "POST", stable, stableBody("wx1", testSecret), 40013},
		{"stable token: wrong secret", "POST", stable, stableBody(demoAppID, "x"), 40125},
		{"stable token: account in the query", "POST", stable + "?" + demoAccount, "", 47001},
		{"plain token: wrong appid", "GET", plain + "appid=wx1" + secret, "", 40013},
		{"plain token: wrong secret", "GET", plain + appID + "&secret=x", "", 40125},
		{"code: wrong secret", "GET", oauth + appID + "&secret=x", "", 40125},
		{"code: unknown", "GET", oauth + demoAccount, "", 40029},
		{"QR code: no access token", "POST", create, good, 40001},
		{"QR code: a user's access token", "POST", create + user, good, 40001},
		{"QR code: not JSON", "POST", with, "expire_seconds=60", 47001},
		{"QR code: a numbered scene", "POST", with, createBody("QR_SCENE", "s", 60), 40097},
		{"QR code: no scene_str", "POST", with, createBody("QR_STR_SCENE", "", 60), 40097},
		{"QR code: scene_str of 64, for 30 days", "POST", with, createBody("QR_STR_SCENE", long, 2592000), 0},
		{"QR code: scene_str of 65", "POST", with, createBody("QR_STR_SCENE", long+"s", 60), 40097},
		{"QR code: for no time", "POST", with, createBody("QR_STR_SCENE", "s", 0), 40097},
		{"QR code: for longer", "POST", with, createBody("QR_STR_SCENE", "s", 2592001), 40097},
		{"profile: unknown access token", "GET", profile + "x&openid=alice", "", 40001},
		{"profile: somebody else's", "GET", profile + user + "&openid=bob", "", 40003},
		{"profile: in snsapi_base scope", "GET", profile + user + "&openid=alice", "", 48001},
	} {
		if got := w.ask(t, test.method, test.call, test.body); got.ErrCode != test.errcode {
			t.Errorf("%s: errcode %d %q, want %d", test.name, got.ErrCode, got.ErrMsg, test.errcode)
		}
	}
}

func TestSimulatedTokensAndCodesLiveAsLongAsWeChats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		works := func(when, token string, want int) {
			if got := w.create(t, token).ErrCode; got != want {
				t.Errorf("%s: errcode %d, want %d", when, got, want)
			}
		}
		former, plain, stable := w.plainToken(t), w.plainToken(t), w.stableToken(t)
		used, late := w.code(t, "alice", "allow"), w.code(t, "bob", "allow")
		w.exchange(t, used)
		time.Sleep(5 * time.Minute)
		works("a plain token that another followed, for 5 minutes", former, 0)
		time.Sleep(time.Nanosecond)
		works("and then", former, 42001)
		works("the other", plain, 0)
		if a, b := w.exchange(t, used), w.exchange(t, late); a.ErrCode != 40163 || b.ErrCode != 42003 {
			t.Errorf("a used code: errcode %d, want 40163; an old one: %d, want 42003", a.ErrCode, b.ErrCode)
		}
		time.Sleep(110*time.Minute - 1)
		if got := w.stableToken(t); got != stable {
			t.Error("the stable token changes 5 minutes before its end")
		}
		time.Sleep(time.Nanosecond)
		if next := w.stableToken(t); next == stable {
			t.Error("within 5 minutes of its end the stable token is still the same")
		}
		works("a stable token that another follows", stable, 0)
		time.Sleep(5 * time.Minute)
		works("after its two hours", stable, 42001)
	})
}

func TestSimulatedAuthorizePageIsParticular(t *testing.T) {
	w := newWorld(t)
	const appID, code, scope = "appid=" + demoAppID, "&response_type=code", "&scope=snsapi_base"
	to := func(address string) string { return "&redirect_uri=" + url.QueryEscape(address) }
	redirect := to("http://127.0.0.1:80/wechat/accessusercode")
	state := "&state=" + strings.Repeat("a", 128)
	for _, test := range []struct{ name, query, want string }{ // want: on the page that refuses
		{"as it should be", appID + redirect + code + scope + state, ""},
		{"state of 129", appID + redirect + code + scope + state + "a", "空白页"},
		{"state with a hyphen", appID + redirect + code + scope + "&state=a-1", "空白页"},
		{"another order", appID + redirect + scope + code + state, "空白页"},
		{"one parameter more", appID + redirect + code + scope + "&state=a1&lang=zh_CN", "空白页"},
		{"another scope", appID + redirect + code + "&scope=snsapi_login" + state, "空白页"},
		{"wrong appid", "appid=wx1" + redirect + code + scope + state, "10003 appid"},
		{"another port", appID + to("http://127.0.0.1:8080/") + code + scope + state, "10003 redirect_uri"},
		{"ours as a user", appID + to("http://127.0.0.1:80@m.example/") + code + scope + state, "10003 redirect_uri"},
		{"unescaped", appID + "&redirect_uri=http://127.0.0.1:80/%<b" + code + scope + state, "10003 redirect_uri"},
	} {
		page := "/demo/connect/oauth2/authorize?" + test.query
		looked, pressed := w.do("GET", page, ""), w.press(page, "alice", "allow")
		if (looked.Code == 200) != (test.want == "") || !strings.Contains(looked.Body.String(), test.want) {
			t.Errorf("%s: %d %s, want %q", test.name, looked.Code, looked.Body, test.want)
		}
		if back := pressed.Header().Get("Location"); (back != "") != (test.want == "") {
			t.Errorf("%s: after Allow: %d, back to %q", test.name, pressed.Code, back)
		}
	}
}

func TestSimulatedPhoneSaysThatAQRCodeHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		idle := w.begin(t, "getloginqr")
		time.Sleep(5*time.Minute + 1)
		for name, out := range map[string]*httptest.ResponseRecorder{
			"opened": w.do("GET", idle.URL, ""), "pressed": w.press(idle.URL, "alice", "scan"),
			"unknown": w.do("GET", "/demo/q/x", ""),
		} {
			if out.Code != 400 || !strings.Contains(out.Body.String(), "二维码已过期") {
				t.Errorf("%s: %d %s", name, out.Code, out.Body)
			}
		}
		if status, _ := w.scan(idle.Ticket, "bob", "scan"); status != 404 {
			t.Errorf("scanned without a ticket: %d", status)
		}
	})
}

// The ticket is of WeChat's own documentation (获取带参数的二维码).
func TestSimulatedTicketsAreLikeWeChats(t *testing.T) {
	const link = "http://weixin.qq.com/q/kZgfwMTm72WWPkovabbI"
	const want = "gQH47joAAAAAAAAAASxodHRwOi8vd2VpeGluLnFxLmNvbS9xL2taZ2Z3TVRtNzJXV1Brb3ZhYmJJAAIEZ23sUwMEmm3sUw=="
	if got := wechatTicket(link, time.Unix(1408003431, 0), 51*time.Second); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestSimulatedPicturesAreOfWeChatsTicketAlone(t *testing.T) {
	w := newWorld(t)
	qr := w.begin(t, "getloginqr")
	const picture = "/demo/cgi-bin/showqrcode?ticket="
	for target, want := range map[string]int{qr.WeChatQRURL: 200, picture + qr.Ticket: 404, picture: 404,
		picture + qr.URL[strings.LastIndex(qr.URL, "/")+1:]: 404} {
		if out := w.do("GET", target, ""); out.Code != want {
			t.Errorf("%s: %d, want %d", target, out.Code, want)
		}
	}
}

// answering lets answer, and not h, answer pushes.
func answering(h http.Handler, answer http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wechat/message" {
			answer(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func TestSimulatedPhoneShowsWhatTheServerReplies(t *testing.T) {
	const fault, reply = "该公众号提供的服务出现故障", "<xml><Content>%s</Content></xml>"
	const sealed = "<xml><Encrypt>x</Encrypt><MsgSignature>%s</MsgSignature></xml>"
	for _, test := range []struct {
		name, body, key string // key: WECHAT_AES_KEY
		status          int
		phone           int
		want            string
	}{
		{"success", "success", "", 200, 200, "no reply"},
		{"nothing", "", "", 200, 200, "no reply"},
		{"a passive reply", fmt.Sprintf(reply, "&lt;script&gt;"), "", 200, 200, "&lt;script&gt;"},
		{"success and a line's end", "success\n", "", 200, 400, fault},
		{"JSON", `{"errcode":0}`, "", 200, 400, fault},
		{"a passive reply and more", "<xml></xml>x", "", 200, 400, fault},
		{"another status", "success", "", 500, 400, fault},
		{"a redirect", "", "", 302, 400, fault},
		{"success, in safe mode", "success", docKey, 200, 200, "no reply"},
		{"an open reply, in safe mode", fmt.Sprintf(reply, "hello"), docKey, 200, 400, "bad signature"},
		{"a badly signed reply", fmt.Sprintf(sealed, "x"), docKey, 200, 400, "bad signature"},
		{"a reply that does not open", fmt.Sprintf(sealed, signature(testToken, "x")), docKey, 200, 400,
			errSealed.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, "WECHAT_AES_KEY="+test.key)
			qr, pushes := w.begin(t, "getloginqr"), 0
			w.handler = answering(w.handler, func(rw http.ResponseWriter, _ *http.Request) {
				pushes++
				rw.Header().Set("Location", "/healthz")
				rw.WriteHeader(test.status)
				io.WriteString(rw, test.body)
			})
			out := w.press(qr.URL, "alice", "scan")
			if out.Code != test.phone || !strings.Contains(out.Body.String(), test.want) || pushes != 1 {
				t.Errorf("%d %s after %d pushes, want %d %q after 1", out.Code, out.Body, pushes, test.phone, test.want)
			}
		})
	}
}

func TestSimulatedPushIsSentThreeTimesIfNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		qr := w.begin(t, "getloginqr")
		pushes := make(chan string, 9)
		w.handler = answering(w.handler, func(_ http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			pushes <- r.URL.RawQuery + string(body)
			time.Sleep(time.Minute)
		})
		start := time.Now()
		status, shown := w.scan(qr.Ticket, "alice", "scan")
		took := time.Since(start)
		if status != 400 || !strings.Contains(shown, "出现故障") || took != 15*time.Second || len(pushes) != 3 {
			t.Errorf("%d %q after %v and %d pushes", status, shown, took, len(pushes))
		} else if first, second, third := <-pushes, <-pushes, <-pushes; first != second || second != third {
			t.Error("the pushes differ")
		}
		time.Sleep(time.Minute) // until the unanswered have ended
	})
}

func TestSimulatorsMemoryIsBounded(t *testing.T) {
	d := newDemo(config{}, nil, nil)
	for i := range maxGrants + 1000 {
		d.issue(strconv.Itoa(i), time.Hour, grant{kind: "qr"})
	}
	if got := len(d.grants); got > maxGrants || got < maxGrants*9/10 {
		t.Errorf("%d grants, want %d", got, maxGrants)
	}
}
