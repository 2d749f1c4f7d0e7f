package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
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

func (w *world) stableToken(t testing.TB) string {
	t.Helper()
	const body = `{"grant_type":"client_credential","appid":%q,"secret":%q}`
	return w.ask(t, "POST", "/cgi-bin/stable_token", fmt.Sprintf(body, demoAppID, testSecret)).AccessToken
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

func TestSimulatorRefusesWhatWeChatRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const appID, secret = "appid=" + demoAppID, "&secret=" + testSecret
		const stable, create = "POST /cgi-bin/stable_token", "POST /cgi-bin/qrcode/create?access_token="
		const plain, oauth = "GET /cgi-bin/token?", "GET /sns/oauth2/access_token?"
		const profile = "GET /sns/userinfo?access_token="
		plainToken := func() string { return w.ask(t, "GET", "/cgi-bin/token?"+demoAccount, "").AccessToken }
		body := func(action, scene string, seconds int) string {
			const body = `{"expire_seconds":%d,"action_name":%q,"action_info":{"scene":{"scene_str":%q}}}`
			return fmt.Sprintf(body, seconds, action, scene)
		}
		former, latest, token := plainToken(), plainToken(), w.stableToken(t)
		used, late := "&code="+w.code(t, "alice", "allow"), "&code="+w.code(t, "bob", "allow")
		user := w.ask(t, "GET", "/sns/oauth2/access_token?"+demoAccount+used, "").AccessToken
		good, long := body("QR_STR_SCENE", "s", 60), strings.Repeat("s", 64)
		start := time.Now()
		for _, test := range []struct {
			after      time.Duration
			name, call string
			body       string
			errcode    int
		}{
			{0, "stable token: wrong appid", stable, `{"grant_type":"client_credential","appid":"wx1"}`, 40013},
			{0, "stable token: account in the query", stable + "?" + demoAccount, "", 47001},
			{0, "plain token: wrong appid", plain + "appid=wx1" + secret, "", 40013},
			{0, "plain token: wrong secret", plain + appID + "&secret=x", "", 40125},
			{0, "code: wrong secret", oauth + appID + "&secret=x" + late, "", 40125},
			{0, "code: unknown", oauth + demoAccount + "&code=x", "", 40029},
			{0, "code: used", oauth + demoAccount + used, "", 40163},
			{0, "QR code: no access token", create, good, 40001},
			{0, "QR code: a user's access token", create + user, good, 40001},
			{0, "QR code: not JSON", create + token, "expire_seconds=60", 47001},
			{0, "QR code: a numbered scene", create + token, body("QR_SCENE", "s", 60), 40097},
			{0, "QR code: no scene_str", create + token, body("QR_STR_SCENE", "", 60), 40097},
			{0, "QR code: scene_str of 64, for 30 days", create + token, body("QR_STR_SCENE", long, 2592000), 0},
			{0, "QR code: scene_str of 65", create + token, body("QR_STR_SCENE", long+"s", 60), 40097},
			{0, "QR code: for no time", create + token, body("QR_STR_SCENE", "s", 0), 40097},
			{0, "QR code: for longer", create + token, body("QR_STR_SCENE", "s", 2592001), 40097},
			{0, "profile: unknown access token", profile + "x&openid=alice", "", 40001},
			{0, "profile: somebody else's", profile + user + "&openid=bob", "", 40003},
			{0, "profile: in snsapi_base scope", profile + user + "&openid=alice", "", 48001},
			{5 * time.Minute, "a plain token that another followed", create + former, good, 0},
			{5*time.Minute + 1, "and 5 minutes later", create + former, good, 42001},
			{5*time.Minute + 1, "the other", create + latest, good, 0},
			{5*time.Minute + 1, "code: 5 minutes old", oauth + demoAccount + late, "", 42003},
			{2 * time.Hour, "a stable token, for 2 hours", create + token, good, 0},
			{2*time.Hour + 1, "and then", create + token, good, 42001},
		} {
			time.Sleep(time.Until(start.Add(test.after)))
			method, call, _ := strings.Cut(test.call, " ")
			if got := w.ask(t, method, call, test.body); got.ErrCode != test.errcode {
				t.Errorf("%s: errcode %d %q, want %d", test.name, got.ErrCode, got.ErrMsg, test.errcode)
			}
		}
	})
}

func TestSimulatedStableTokenChanges5MinutesBeforeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		token := w.stableToken(t)
		time.Sleep(115 * time.Minute)
		same := w.stableToken(t)
		time.Sleep(time.Nanosecond)
		if next := w.stableToken(t); same != token || next == token {
			t.Errorf("until then it is the same: %v; after it, another: %v", same == token, next != token)
		}
	})
}

func TestSimulatorShowsWhatWeChatWould(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const authorize, appID = "/demo/connect/oauth2/authorize?", "appid=" + demoAppID
		const picture = "/demo/cgi-bin/showqrcode?ticket="
		const code, scope = "&response_type=code", "&scope=snsapi_base"
		to := func(address string) string { return "&redirect_uri=" + url.QueryEscape(address) }
		back, state := to("http://127.0.0.1:80/wechat/accessusercode"), "&state="+strings.Repeat("a", 128)
		w := newWorld(t)
		late := w.begin(t, "getloginqr")
		time.Sleep(5*time.Minute + 1)
		qr := w.begin(t, "getloginqr")
		for _, test := range []struct {
			name, link string
			status     int
			want       string
		}{
			{"as it should be", authorize + appID + back + code + scope + state, 200, ""},
			{"state of 129", authorize + appID + back + code + scope + state + "a", 400, "空白页"},
			{"state with a hyphen", authorize + appID + back + code + scope + "&state=a-1", 400, "空白页"},
			{"another order", authorize + appID + back + scope + code + state, 400, "空白页"},
			{"one parameter more", authorize + appID + back + code + scope + "&state=a1&lang=zh_CN", 400, "空白页"},
			{"another scope", authorize + appID + back + code + "&scope=snsapi_login" + state, 400, "空白页"},
			{"wrong appid", authorize + "appid=wx1" + back + code + scope + state, 400, "10003 appid"},
			{"another port", authorize + appID + to("http://127.0.0.1:8080/") + code + scope + state, 400, "10003"},
			{"ours, as a user", authorize + appID + to("http://127.0.0.1:80@m/") + code + scope + state, 400, "10003"},
			{"a QR code", qr.URL, 200, ""},
			{"a QR code that has expired", late.URL, 400, "二维码已过期"},
			{"an unknown QR code", "/demo/q/x", 400, "二维码已过期"},
			{"a picture", qr.WeChatQRURL, 200, "PNG"},
			{"a picture of our ticket", picture + qr.Ticket, 404, ""},
			{"a picture of what a link ends with", picture + path.Base(qr.URL), 404, ""},
		} {
			looked, pressed := w.do("GET", test.link, ""), w.press(test.link, "alice", "allow")
			if looked.Code != test.status || !strings.Contains(looked.Body.String(), test.want) {
				t.Errorf("%s: %d %s, want %d %q", test.name, looked.Code, looked.Body, test.status, test.want)
			}
			if (pressed.Code == 400) != (test.status == 400) {
				t.Errorf("%s: pressed, it answers %d", test.name, pressed.Code)
			}
		}
		status, _ := w.scan(late.Ticket, "bob", "scan")
		equal(t, "scanned when the ticket has expired", status, 404)
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

func TestSimulatedPhoneShowsWhatTheServerReplies(t *testing.T) {
	const fault, reply = "该公众号提供的服务出现故障", "<xml><Content>%s</Content></xml>"
	const sealed = "<xml><Encrypt>x</Encrypt><MsgSignature>%s</MsgSignature></xml>"
	badly, unopened := fmt.Sprintf(sealed, "x"), fmt.Sprintf(sealed, signature(testToken, "x"))
	for _, test := range []struct {
		name, body, key string // key: WECHAT_AES_KEY
		status          int
		phone           int
		want            string
	}{
		{"nothing", "", "", 200, 200, "no reply"},
		{"a passive reply", fmt.Sprintf(reply, "&lt;script&gt;"), "", 200, 200, "&lt;script&gt;"},
		{"success and a line's end", "success\n", "", 200, 400, fault},
		{"JSON", `{"errcode":0}`, "", 200, 400, fault},
		{"another status", "success", "", 500, 400, fault},
		{"a redirect", "", "", 302, 400, fault},
		{"an open reply, in safe mode", fmt.Sprintf(reply, "hello"), docKey, 200, 400, "bad signature"},
		{"a badly signed reply", badly, docKey, 200, 400, "bad signature"},
		{"a reply that does not open", unopened, docKey, 200, 400, errSealed.Error()},
		{"no answer for 5 seconds, three times", "late", "", 200, 400, fault},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, "WECHAT_AES_KEY="+test.key)
			qr, real, pushes, start := w.begin(t, "getloginqr"), w.handler, make(chan string, 9), time.Now()
			w.handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/wechat/message" {
					real.ServeHTTP(rw, r)
					return
				}
				body, _ := io.ReadAll(r.Body)
				pushes <- r.URL.RawQuery + string(body)
				if test.body == "late" {
					time.Sleep(time.Minute)
				}
				rw.Header().Set("Location", "/healthz")
				rw.WriteHeader(test.status)
				io.WriteString(rw, test.body)
			})
			out := w.press(qr.URL, "alice", "scan")
			if out.Code != test.phone || !strings.Contains(out.Body.String(), test.want) {
				t.Errorf("%s: %d %s, want %d %q", test.name, out.Code, out.Body, test.phone, test.want)
			}
			if test.body != "late" {
				equal(t, test.name+": pushes", len(pushes), 1)
			} else {
				took, first, again := time.Since(start), <-pushes, <-pushes
				if took != 15*time.Second || first != again || len(pushes) != 1 {
					t.Errorf("%s: %q, %q and %d more, in %v", test.name, first, again, len(pushes), took)
				}
			}
			time.Sleep(time.Minute) // until the unanswered have ended
		})
	}
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
