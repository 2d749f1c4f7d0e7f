package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
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
	if err := json.Unmarshal(out.Body.Bytes(), &got); err != nil || out.Code != 200 || out.Header().Get("Content-Type") != "text/plain" {
		t.Errorf("%s: %d %s %q, %v", call, out.Code, out.Header().Get("Content-Type"), out.Body, err)
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
	return fmt.Sprintf(`{"expire_seconds":%d,"action_name":%q,"action_info":{"scene":{"scene_str":%q}}}`, seconds, action, scene)
}

// create asks for a QR code of a minute, with an access token.
func (w *world) create(t testing.TB, token string) answer {
	t.Helper()
	return w.ask(t, "POST", "/cgi-bin/qrcode/create?access_token="+url.QueryEscape(token), createBody("QR_STR_SCENE", "s", 60))
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
	const stable, plain, create = "/cgi-bin/stable_token", "/cgi-bin/token?grant_type=client_credential", "/cgi-bin/qrcode/create"
	const oauth, profile = "/sns/oauth2/access_token?grant_type=authorization_code&code=x", "/sns/userinfo"
	good, long := createBody("QR_STR_SCENE", "s", 60), strings.Repeat("s", 64)
	with := create + "?access_token=" + url.QueryEscape(token)
	for _, test := range []struct {
		name, method, call, body string
		errcode                  int
	}{
		{"stable token: wrong appid", "POST", stable, stableBody("wx1", testSecret), 40013},
		{"stable token: wrong secret", "POST", stable, stableBody(demoAppID, "x"), 40125},
		{"stable token: account in the query", "POST", stable + "?grant_type=client_credential&" + demoAccount, "", 47001},
		{"plain token: wrong appid", "GET", plain + "&appid=wx1&secret=" + testSecret, "", 40013},
		{"plain token: wrong secret", "GET", plain + "&appid=" + demoAppID + "&secret=x", "", 40125},
		{"code: wrong secret", "GET", oauth + "&appid=" + demoAppID + "&secret=x", "", 40125},
		{"code: unknown", "GET", oauth + "&" + demoAccount, "", 40029},
		{"code: an access token instead", "GET", strings.Replace(oauth, "=x", "="+token, 1) + "&" + demoAccount, "", 40029},
		{"QR code: no access token", "POST", create, good, 40001},
		{"QR code: access token in the body", "POST", create, "access_token=" + token, 40001},
		{"QR code: a user's access token", "POST", create + "?access_token=" + user, good, 40001},
		{"QR code: not JSON", "POST", with, "expire_seconds=60", 47001},
		{"QR code: a numbered scene's action_name", "POST", with, createBody("QR_SCENE", "s", 60), 40097},
		{"QR code: no scene_str", "POST", with, createBody("QR_STR_SCENE", "", 60), 40097},
		{"QR code: scene_str of 64, for 30 days", "POST", with, createBody("QR_STR_SCENE", long, 2592000), 0},
		{"QR code: scene_str of 65", "POST", with, createBody("QR_STR_SCENE", long+"s", 60), 40097},
		{"QR code: for no time", "POST", with, createBody("QR_STR_SCENE", "s", 0), 40097},
		{"QR code: for longer", "POST", with, createBody("QR_STR_SCENE", "s", 2592001), 40097},
		{"profile: unknown access token", "GET", profile + "?openid=alice&access_token=x", "", 40001},
		{"profile: somebody else's", "GET", profile + "?openid=bob&access_token=" + user, "", 40003},
		{"profile: in snsapi_base scope", "GET", profile + "?openid=alice&access_token=" + user, "", 48001},
	} {
		got := w.ask(t, test.method, test.call, test.body)
		if got.ErrCode != test.errcode || (test.errcode != 0) != strings.Contains(got.ErrMsg, "rid: ") {
			t.Errorf("%s: errcode %d %q, want %d and, if refused, a rid", test.name, got.ErrCode, got.ErrMsg, test.errcode)
		}
		if test.errcode != 0 && (got.AccessToken != "" || got.Ticket != "" || got.OpenID != "") {
			t.Errorf("%s: refused, and yet given: %+v", test.name, got)
		}
	}
}

func TestSimulatedStableTokenIsTheSameUntilItNearsItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		ask := func() answer {
			return w.ask(t, "POST", "/cgi-bin/stable_token", stableBody(demoAppID, testSecret))
		}
		first := ask()
		if first.ExpiresIn != 7200 || len(first.AccessToken) < 100 {
			t.Errorf("%+v", first)
		}
		time.Sleep(time.Hour)
		w.plainToken(t) // which is another token's business
		if got := ask(); got.AccessToken != first.AccessToken || got.ExpiresIn != 3600 {
			t.Errorf("after an hour it is %+v", got)
		}
		time.Sleep(55 * time.Minute)
		if got := ask(); got.AccessToken != first.AccessToken || got.ExpiresIn != 300 {
			t.Errorf("5 minutes before its end it is %+v", got)
		}
		time.Sleep(time.Nanosecond)
		second := ask()
		if second.AccessToken == first.AccessToken || second.ExpiresIn != 7200 {
			t.Errorf("within 5 minutes of its end it is still %+v", second)
		}
		time.Sleep(5*time.Minute - 2*time.Nanosecond)
		if a, b := w.create(t, first.AccessToken), w.create(t, second.AccessToken); a.ErrCode != 0 || b.ErrCode != 0 {
			t.Errorf("while one follows the other: errcode %d and %d", a.ErrCode, b.ErrCode)
		}
		time.Sleep(2 * time.Nanosecond)
		if a, b := w.create(t, first.AccessToken), w.create(t, second.AccessToken); a.ErrCode != 42001 || b.ErrCode != 0 {
			t.Errorf("after two hours of the first: errcode %d, want 42001, and %d, want 0", a.ErrCode, b.ErrCode)
		}
	})
}

func TestSimulatedPlainTokenEndsTheFormer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first, second := w.plainToken(t), w.plainToken(t)
		time.Sleep(5*time.Minute - 1)
		if a, b := w.create(t, first), w.create(t, second); a.ErrCode != 0 || b.ErrCode != 0 || first == second {
			t.Errorf("both should live: errcode %d and %d", a.ErrCode, b.ErrCode)
		}
		time.Sleep(2)
		if a, b := w.create(t, first), w.create(t, second); a.ErrCode != 42001 || b.ErrCode != 0 {
			t.Errorf("the former should be dead: errcode %d, want 42001, and %d, want 0", a.ErrCode, b.ErrCode)
		}
	})
}

func TestSimulatedCodeIsGoodOnceAndFor5Minutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		used, last, late := w.code(t, "alice", "allow"), w.code(t, "bob", "allow"), w.code(t, "carol", "allow")
		if got := w.exchange(t, used); got.OpenID != "alice" || got.AccessToken == "" || got.IsSnapshotUser != 0 {
			t.Errorf("a good code: %+v", got)
		}
		if got := w.exchange(t, used); got.ErrCode != 40163 || got.OpenID != "" {
			t.Errorf("a used code: %+v, want errcode 40163", got)
		}
		time.Sleep(5*time.Minute - 1)
		if got := w.exchange(t, last); got.OpenID != "bob" {
			t.Errorf("a code in its last moment: %+v", got)
		}
		time.Sleep(2 * time.Nanosecond)
		if got := w.exchange(t, late); got.ErrCode != 42003 || got.OpenID != "" {
			t.Errorf("a code after 5 minutes: %+v, want errcode 42003", got)
		}
		if got := w.exchange(t, used); got.ErrCode != 40163 {
			t.Errorf("a used code after 5 minutes: %+v, want errcode 40163", got)
		}
		if got := w.exchange(t, w.code(t, "dave", "snapshot")); got.IsSnapshotUser != 1 {
			t.Errorf("a snapshot page's code: %+v", got)
		}
		if got := w.exchange(t, w.code(t, "erin", "decline")); got.ErrCode != 40029 {
			t.Errorf("the code of who declined: %+v", got)
		}
	})
}

func TestSimulatedProfileIsForUserinfoScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo")
		token := w.exchange(t, w.code(t, "alice", "allow")).AccessToken
		ask := func() answer {
			return w.ask(t, "GET", "/sns/userinfo?lang=zh_CN&openid=alice&access_token="+token, "")
		}
		got := ask()
		if got.OpenID != "alice" || got.Nickname == "" || got.UnionID == "" {
			t.Errorf("%+v", got)
		}
		avatar, err := url.Parse(got.HeadImgURL)
		must(t, err)
		if out := w.do("GET", avatar.Path, ""); out.Code != 200 || out.Header().Get("Content-Type") != "image/svg+xml" {
			t.Errorf("the avatar: %d %s", out.Code, out.Header().Get("Content-Type"))
		}
		time.Sleep(2*time.Hour + 1)
		if got := ask(); got.ErrCode != 40001 {
			t.Errorf("after two hours: %+v", got)
		}
	})
}

func TestSimulatedAuthorizePageIsParticular(t *testing.T) {
	w := newWorld(t)
	const page, appID = "/demo/connect/oauth2/authorize?", "appid=" + demoAppID
	const redirect = "&redirect_uri=http%3A%2F%2F127.0.0.1%3A80%2Fwechat%2Faccessusercode"
	const code, scope, state = "&response_type=code", "&scope=snsapi_base", "&state="
	for _, test := range []struct{ name, query, want string }{ // want: on the page that refuses
		{"as it should be", appID + redirect + code + scope + state + "a1", ""},
		{"state of 128", appID + redirect + code + scope + state + strings.Repeat("a", 128), ""},
		{"state of 129", appID + redirect + code + scope + state + strings.Repeat("a", 129), "空白页"},
		{"state with a hyphen", appID + redirect + code + scope + state + "a-1", "空白页"},
		{"scope and response_type swapped", appID + redirect + scope + code + state + "a1", "空白页"},
		{"one parameter more", appID + redirect + code + scope + state + "a1&lang=zh_CN", "空白页"},
		{"another scope", appID + redirect + code + "&scope=snsapi_login" + state + "a1", "空白页"},
		{"wrong appid", "appid=wx1" + redirect + code + scope + state + "a1", "10003 appid"},
		{"redirect_uri to another port", appID + "&redirect_uri=http%3A%2F%2F127.0.0.1%3A8080%2F" + code + scope + state + "a1", "10003"},
		{"redirect_uri to ours as a user name", appID + "&redirect_uri=http%3A%2F%2F127.0.0.1%3A80%40m.example%2F" + code + scope + state + "a1", "10003"},
		{"redirect_uri unescaped", appID + "&redirect_uri=http://127.0.0.1:80/" + code + scope + state + "a1", "10003"},
	} {
		looked, pressed := w.do("GET", page+test.query, ""), w.press(page+test.query, "alice", "allow")
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
		time.Sleep(5*time.Minute - 1)
		if out := w.do("GET", idle.URL, ""); out.Code != 200 {
			t.Errorf("in its last moment: %d %s", out.Code, out.Body)
		}
		time.Sleep(2)
		for name, out := range map[string]*httptest.ResponseRecorder{
			"opened": w.do("GET", idle.URL, ""), "pressed": w.press(idle.URL, "alice", "scan"), "unknown": w.do("GET", "/demo/q/x", ""),
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

func TestSimulatedTicketsMustBeEscaped(t *testing.T) {
	w := newWorld(t)
	qr := w.begin(t, "getloginqr")
	_, ticket, _ := strings.Cut(qr.WeChatQRURL, "ticket=")
	const picture = "/demo/cgi-bin/showqrcode?ticket="
	for _, test := range []struct {
		name, target string
		status       int
	}{
		{"escaped, as ours is", qr.WeChatQRURL, 200},
		{"ours", picture + qr.Ticket, 404},
		{"cut off", picture + ticket[:len(ticket)-3], 404},
		{"unknown", picture + "x", 404},
		{"none", picture, 404},
		{"the id of its link", picture + qr.URL[strings.LastIndex(qr.URL, "/")+1:], 404},
	} {
		if out := w.do("GET", test.target, ""); out.Code != test.status || (test.status == 200) != (out.Header().Get("Content-Type") == "image/png") {
			t.Errorf("%s: %d %s, want %d", test.name, out.Code, out.Header().Get("Content-Type"), test.status)
		}
	}
}

func TestSimulatedPhoneEscapesWhatItShows(t *testing.T) {
	w := newWorld(t)
	link := "/demo/connect/oauth2/authorize?appid=" + demoAppID + "&redirect_uri=http%3A%2F%2F127.0.0.1%3A80%2F%<b&response_type=code&scope=snsapi_base&state=a"
	shown := w.press(link, "alice", "allow")
	if page := shown.Body.String(); shown.Code != 400 || !strings.Contains(page, "%&lt;b") || strings.Contains(page, "%<b") {
		t.Errorf("an error: %d %s", shown.Code, page)
	}
	qr := w.begin(t, "getloginqr")
	w.handler = answering(w.handler, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "<xml><Content>&lt;script&gt;alert(1)&lt;/script&gt;</Content></xml>")
	})
	shown = w.press(qr.URL, "alice", "scan")
	if page := shown.Body.String(); shown.Code != 200 || !strings.Contains(page, "&lt;script&gt;") || strings.Contains(page, "<script>") {
		t.Errorf("a reply: %d %s", shown.Code, page)
	}
	if got := shown.Header().Get("Content-Type"); got != "text/html; charset=utf-8" {
		t.Errorf("Content-Type %q", got)
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
	const fault = "该公众号提供的服务出现故障"
	for _, test := range []struct {
		name, body, sealed string // sealed: WECHAT_AES_KEY
		status             int
		phone              int
		want               string
	}{
		{"success", "success", "", 200, 200, "no reply"},
		{"nothing", "", "", 200, 200, "no reply"},
		{"a passive reply", "<xml><Content><![CDATA[hello]]></Content></xml>", "", 200, 200, "hello"},
		{"Success", "Success", "", 200, 400, fault},
		{"success and a line's end", "success\n", "", 200, 400, fault},
		{"JSON", `{"errcode":0}`, "", 200, 400, fault},
		{"HTML", "<html></html>", "", 200, 400, fault},
		{"a passive reply and more", "<xml></xml>x", "", 200, 400, fault},
		{"another status", "success", "", 500, 400, fault},
		{"no content", "", "", 204, 400, fault},
		{"a redirect", "", "", 302, 400, fault},
		{"success, in safe mode", "success", docKey, 200, 200, "no reply"},
		{"an open reply, in safe mode", "<xml><Content>hello</Content></xml>", docKey, 200, 400, "bad signature"},
		{"a badly signed reply, in safe mode", "<xml><Encrypt>x</Encrypt><MsgSignature>x</MsgSignature></xml>", docKey, 200, 400, "bad signature"},
		{"a signed reply that does not open", "<xml><Encrypt>x</Encrypt><MsgSignature>" + signature(testToken, "x") + "</MsgSignature></xml>", docKey, 200, 400, errSealed.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, "WECHAT_AES_KEY="+test.sealed)
			qr, pushes := w.begin(t, "getloginqr"), 0
			w.handler = answering(w.handler, func(rw http.ResponseWriter, _ *http.Request) {
				pushes++
				rw.Header().Set("Location", "/healthz")
				rw.WriteHeader(test.status)
				io.WriteString(rw, test.body)
			})
			status, shown := w.scan(qr.Ticket, "alice", "scan")
			if status != test.phone || !strings.Contains(shown, test.want) || pushes != 1 {
				t.Errorf("%d %q after %d pushes, want %d %q after 1", status, shown, pushes, test.phone, test.want)
			}
		})
	}
}

func TestSimulatedPushIsSentThreeTimesIfNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		qr := w.begin(t, "getloginqr")
		var pushes []string                      // guarded by w.mu, as is takes
		takes := 5*time.Second + time.Nanosecond // the server, to answer a push
		w.handler = answering(w.handler, func(rw http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.mu.Lock()
			pushes = append(pushes, r.URL.RawQuery+string(body))
			pause := takes
			w.mu.Unlock()
			time.Sleep(pause)
			io.WriteString(rw, "success")
		})
		start := time.Now()
		if status, shown := w.scan(qr.Ticket, "alice", "scan"); status != 400 || !strings.Contains(shown, "出现故障") || time.Since(start) != 15*time.Second {
			t.Errorf("%d %q after %v", status, shown, time.Since(start))
		}
		w.mu.Lock()
		if len(pushes) != 3 || len(slices.Compact(pushes)) != 1 {
			t.Errorf("%d pushes, want 3 of the same: %q", len(pushes), pushes)
		}
		pushes, takes = nil, 5*time.Second-time.Nanosecond
		w.mu.Unlock()
		if status, shown := w.scan(qr.Ticket, "alice", "scan"); status != 200 || len(pushes) != 1 {
			t.Errorf("%d %q after %d pushes", status, shown, len(pushes))
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
