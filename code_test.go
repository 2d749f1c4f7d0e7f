package main

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const testAPIToken = "apiTOKENapiTOKEN"

// A codeTicket is what getlogincode answers.
type codeTicket struct {
	Ticket, Code, QRURL string
	ExpiresIn           int
}

func (w *world) beginCode(t testing.TB) (begun codeTicket) {
	t.Helper()
	out := w.do("GET", "/wechat/getlogincode", "", "peer", fmt.Sprintf("198.51.%d.%d:1", len(w.issued)/200,
		len(w.issued)%200))
	if err := json.Unmarshal(out.Body.Bytes(), &begun); err != nil || out.Code != 200 {
		t.Fatalf("getlogincode: %d %s", out.Code, out.Body)
	}
	w.issued = append(w.issued, begun.Ticket)
	return begun
}

// say sends a text as somebody; it returns what the simulated phone shows, "" for nothing.
func (w *world) say(t testing.TB, openID, text string) string {
	t.Helper()
	query, message, err := w.config.signedText(openID, text)
	must(t, err)
	return w.deliver(t, "/wechat/message", query, message)
}

// deliver sends a push; it returns the answer's text, opened if it is sealed.
func (w *world) deliver(t testing.TB, path string, query url.Values, message []byte) string {
	t.Helper()
	out := w.do("POST", path+"?"+query.Encode(), string(message))
	if out.Code != 200 {
		t.Errorf("a push: %d %s", out.Code, out.Body)
		return ""
	}
	body := out.Body.Bytes()
	if string(body) == "success" {
		return ""
	}
	var reply struct{ Content, Encrypt string }
	must(t, xml.Unmarshal(body, &reply))
	if w.config.aesKey != nil {
		opened, err := w.config.aesKey.open(reply.Encrypt, w.config.appID)
		must(t, err)
		must(t, xml.Unmarshal(opened, &reply))
	}
	return reply.Content
}

// user asks as one-api and new-api do.
func (w *world) user(t testing.TB, code, authorization string) (answer struct {
	Success       bool
	Message, Data string
}) {
	t.Helper()
	out := w.do("GET", "/api/wechat/user?code="+code, "", "Authorization", authorization)
	if out.Code != 200 {
		t.Errorf("the status is %d", out.Code)
	}
	must(t, json.Unmarshal(out.Body.Bytes(), &answer))
	return answer
}

// eachStore runs a test in both modes, on memory and, without a bubble, on Redis.
func eachStore(t *testing.T, test func(t *testing.T, w *world), settings ...string) {
	for mode, key := range map[string]string{"plain": "", "sealed": docKey} {
		settings := append([]string{"FLOWS=scan,code", "API_TOKEN=" + testAPIToken, "WECHAT_AES_KEY=" + key},
			settings...)
		t.Run(mode+" on memory", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, newWorld(t, settings...)) })
		})
		t.Run(mode+" on Redis", func(t *testing.T) {
			t.Setenv("WXSCAN_REDIS", "redis://127.0.0.1:"+startRedis(t).port)
			test(t, newWorld(t, settings...))
		})
	}
}

func TestDigitsThatAreSentLogIn(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		for _, write := range []func(string) string{
			func(s string) string { return s },
			func(s string) string { return "\n " + s + "　" },
			func(s string) string { return s[:3] + " " + s[3:] },
			func(s string) string { return strings.Map(func(c rune) rune { return c - '0' + '０' }, s) },
		} {
			begun, other := w.beginCode(t), w.beginCode(t)
			if !regexp.MustCompile(`^\d{6}$`).MatchString(begun.Code) || begun.Code == other.Code ||
				begun.ExpiresIn != 300 ||
				!strings.HasSuffix(begun.QRURL, "/qr/code?username=gh_0123456789ab") {
				t.Errorf("%+v", begun)
			}
			if got := w.say(t, "alice", write(begun.Code)); !strings.Contains(got, "您已登录") {
				t.Errorf("%q: the phone shows %q", write(begun.Code), got)
			}
			if got := w.check(t, begun.Ticket, ""); !got.Login || got.OpenID != "alice" || got.Token == "" {
				t.Errorf("%+v", got)
			}
			if got := w.say(t, "mallory", begun.Code); !strings.Contains(got, "数字不对") {
				t.Errorf("the second sender is told %q", got)
			}
			if got := w.check(t, begun.Ticket, ""); got.OpenID != "alice" {
				t.Errorf("the second sender logs in: %+v", got)
			}
			if got := w.check(t, other.Ticket, ""); got.Status != statusPending {
				t.Errorf("another browser: %+v", got)
			}
			w.mistypes = newGuessGuard(maxMistypes, maxAllMistypes, 10*time.Minute)
		}
	})
}

func TestSimulatedPhoneSendsTheDigits(t *testing.T) {
	w := newWorld(t, "FLOWS=code")
	begun := w.beginCode(t)
	if status, shown := w.scan(begun.Ticket, "alice", ""); status != 200 || !strings.Contains(shown, "您已登录") {
		t.Errorf("%d %s", status, shown)
	}
	begun = w.beginCode(t)
	out := w.submit("/demo/chat", "openid", "bob", "content", begun.Code)
	if got := w.check(t, begun.Ticket, ""); got.OpenID != "bob" || !strings.Contains(out.Body.String(), "您已登录") {
		t.Errorf("%+v, %s", got, out.Body)
	}
	if out = w.submit("/demo/chat", "openid", "carol", "event", "subscribe"); !strings.Contains(out.Body.String(),
		"六位数字") {
		t.Errorf("who follows is told %s", out.Body)
	}
	for path, want := range map[string]int{"gh_0123456789ab": 200, "other": 404} {
		if out := w.do("GET", "/demo/qr/code?username="+path, ""); out.Code != want {
			t.Errorf("%s: %d", path, out.Code)
		}
	}
}

func TestDigitsAreConfirmedByTheLinkInTheReply(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		begun := w.beginCode(t)
		query, message, err := w.config.signedText("alice", begun.Code)
		must(t, err)
		link := regexp.MustCompile(`/wechat/confirm\?s=\w+`)
		first := link.FindString(w.deliver(t, "/wechat/message", query, message))
		again := link.FindString(w.deliver(t, "/wechat/message", query, message))
		if first == "" || again != first {
			t.Fatalf("the links are %q and %q", first, again)
		}
		if out := w.do("GET", first, ""); out.Code != 200 {
			t.Errorf("the link: %d", out.Code)
		}
		if got := w.check(t, begun.Ticket, ""); got.Status != statusScanned || got.Number == "" {
			t.Errorf("%+v", got)
		}
		if got := w.say(t, "mallory", begun.Code); strings.Contains(got, "confirm") {
			t.Errorf("another is told %q", got)
		}
	}, "CONFIRM=true")
}

func TestAMessageThatComesAgainLogsInOnceAndNobodyElse(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		begun := w.beginCode(t)
		message := func(code string) string { // as WeChat pushes it again: with a signature of its own
			body := fmt.Sprintf("<xml><ToUserName>gh_1</ToUserName><FromUserName>alice</FromUserName>"+
				"<CreateTime>1</CreateTime>"+
				"<MsgType>text</MsgType><Content>%s</Content><MsgId>77</MsgId></xml>", code)
			if w.config.aesKey == nil {
				return w.deliver(t, "/wechat/message", mustQuery(t, w.signed()), []byte(body))
			}
			var push struct {
				XMLName struct{} `xml:"xml"`
				Raw     string   `xml:",innerxml"`
			}
			push.Raw = strings.TrimSuffix(strings.TrimPrefix(body, "<xml>"), "</xml>")
			query, sealed, err := w.config.signedBody(push)
			must(t, err)
			return w.deliver(t, "/wechat/message", query, sealed)
		}
		for range 3 {
			if got := message(begun.Code); !strings.Contains(got, "您已登录") {
				t.Errorf("the sender is told %q", got)
			}
		}
		other := w.beginCode(t) // whose digits happen to be those of the message
		if message(other.Code); w.check(t, other.Ticket, "").Login {
			t.Error("a replay logs another browser in")
		}
	})
}

func TestWrongDigitsAreAnsweredFiveTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "FLOWS=code", "TICKET_TTL=1h")
		begun := w.beginCode(t)
		wrong := wrongDigits(begun.Code)
		for i := range 20 {
			got := w.say(t, "mallory", wrong)
			if want := i < maxMistypes; strings.Contains(got, "数字不对") != want {
				t.Errorf("wrong digits, time %d: %q", i+1, got)
			}
			if isLast := i == maxMistypes-1; strings.Contains(got, "十分钟") != isLast {
				t.Errorf("wrong digits, time %d: %q", i+1, got)
			}
		}
		if got := w.say(t, "mallory", begun.Code); got != "" || w.check(t, begun.Ticket, "").Login {
			t.Errorf("who guesses on is told %q when right", got)
		}
		time.Sleep(10 * time.Minute)
		if w.say(t, "mallory", begun.Code); !w.check(t, begun.Ticket, "").Login {
			t.Error("after ten minutes the right digits do not log in")
		}
	})
}

// TestGuessersTogetherAreLimited has 1,000 senders guess ten times each within
// ten minutes. What counts is the first guess of each, and maxAllMistypes in all.
func TestGuessersTogetherAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "FLOWS=code", "TICKET_TTL=1h")
		begun := w.beginCode(t)
		wrong, answered := wrongDigits(begun.Code), 0
		for range 10 {
			for i := range 1000 {
				if w.say(t, fmt.Sprint("mallory", i), wrong) != "" {
					answered++
				}
			}
		}
		if answered != 1000 { // and not 5,000
			t.Errorf("%d guesses count", answered)
		}
		if w.say(t, "mallory7", begun.Code); w.check(t, begun.Ticket, "").Login {
			t.Error("one of the guessers logs in")
		}
		if w.say(t, "alice", begun.Code); !w.check(t, begun.Ticket, "").Login {
			t.Error("who was never wrong does not log in")
		}
	})
}

func wrongDigits(code string) string {
	if code == "000000" {
		return "000001"
	}
	return "000000"
}

func TestOtherMessagesAreAnsweredWithSuccess(t *testing.T) {
	for _, test := range []struct {
		settings []string
		text     string
		want     string // in the answer; "" is success
	}{
		{[]string{"FLOWS=code"}, "hello", ""},
		{[]string{"FLOWS=code"}, "12345", ""},
		{[]string{"FLOWS=code"}, "1234567", ""},
		{[]string{"FLOWS=code"}, "12345a", ""},
		{[]string{"FLOWS=code"}, "验证码", ""},
		{[]string{"FLOWS=code"}, "", ""},
		{nil, "123456", ""},
		{[]string{"API_TOKEN=" + testAPIToken}, "123456", ""},
		{[]string{"API_TOKEN=" + testAPIToken}, "谢谢", ""},
		{[]string{"API_TOKEN=" + testAPIToken}, " 验证码\n", "三分钟"},
		{[]string{"API_TOKEN=" + testAPIToken}, "Login", "三分钟"},
		{[]string{"API_TOKEN=" + testAPIToken}, "登录", "三分钟"},
	} {
		w := newWorld(t, test.settings...)
		if got := w.say(t, "alice", test.text); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%q, %q: %q, want %q", test.settings, test.text, got, test.want)
		}
	}
	for settings, want := range map[string]string{"FLOWS=code,scan": "六位数字", "FLOWS=scan": "success"} {
		w := newWorld(t, settings)
		for _, key := range []string{"", "last_trade_no_1"} {
			if got := w.push(pushXML("alice", "subscribe", key, "")).Body.String(); !strings.Contains(got, want) {
				t.Errorf("%s: who follows is told %q, want %q", settings, got, want)
			}
		}
		if got := w.push(pushXML("alice", "unsubscribe", "", "")).Body.String(); got != "success" {
			t.Errorf("who leaves is told %q", got)
		}
	}
}

func TestDigitsAreNoTickets(t *testing.T) {
	w := newWorld(t, "FLOWS=code", "API_TOKEN="+testAPIToken)
	begun := w.beginCode(t)
	code := firstLine(w.say(t, "alice", "login"))
	for _, text := range []string{begun.Code, "digits " + begun.Code, code, "code " + code, "sender alice",
		"scene code"} {
		if got := w.check(t, text, ""); got.Status != statusExpired {
			t.Errorf("a poll for %q: %+v", text, got)
		}
	}
	for _, picture := range []string{"png", "svg", "txt"} {
		if out := w.do("GET", "/wechat/qr."+picture+"?ticket="+begun.Ticket, ""); out.Code != 404 {
			t.Errorf("the %s of a ticket without a code: %d", picture, out.Code)
		}
	}
	qr := w.begin(t, "getloginqr")
	w.push(pushXML("mallory", "SCAN", digest(begun.Ticket).String(), ""))
	if w.check(t, begun.Ticket, "").Login || w.check(t, qr.Ticket, "").Login {
		t.Error("a scan logs a ticket of flow C in")
	}
}

func TestLoginCodeIsAskedForAsQRCodesAre(t *testing.T) {
	w := newWorld(t, "FLOWS=code", "QR_RATE=2", "ALLOWED_ORIGINS=https://app.example.com")
	for _, test := range []struct {
		method, site, origin string
		want                 int
	}{
		{"HEAD", "", "", 405}, {"POST", "", "", 405}, {"GET", "cross-site", "", 403}, {"GET", "same-site", "", 403},
		{"GET", "same-origin", "", 200}, {"GET", "cross-site", "https://app.example.com", 200}, {"GET", "", "", 429},
	} {
		out := w.do(test.method, "/wechat/getlogincode", "", "Sec-Fetch-Site", test.site, "Origin", test.origin, "peer",
			"203.0.113.1:1")
		if out.Code != test.want {
			t.Errorf("%+v: %d", test, out.Code)
		}
	}
	if out := newWorld(t).do("GET", "/wechat/getlogincode", ""); out.Code != 404 {
		t.Errorf("where flow C is off: %d", out.Code)
	}
	w.config.appSecret = ""
	w.handler = w.routes()
	defer func() { w.config.appSecret = testSecret }()
	for _, path := range []string{"/wechat/getloginqr", "/wechat/getauthqr"} {
		if out := w.do("GET", path, ""); out.Code != 404 {
			t.Errorf("%s without an appsecret: %d", path, out.Code)
		}
	}
}

func TestFlowCNeedsTheTokenAlone(t *testing.T) {
	few := []string{"FLOWS=code", "WECHAT_TOKEN=token123", "PUBLIC_URL=https://login.example.com"}
	if _, err := parseConfig(nil, only(few...), t.Output()); err != nil {
		t.Error(err)
	}
	if _, err := parseConfig(nil, only(append(few, "WECHAT_AES_KEY="+docKey)...), t.Output()); err == nil ||
		!strings.HasPrefix(err.Error(), "WECHAT_APPID:") {
		t.Errorf("sealed, without the appid that seals: %v", err)
	}
	few[0] = "FLOWS=code,auth"
	if _, err := parseConfig(nil, only(few...), t.Output()); err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("beside another flow: %v", err)
	}
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

func TestClientOfWeChatServer(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		old := firstLine(w.say(t, "alice", "验证码"))
		query, message, err := w.config.signedText("alice", "验证码")
		must(t, err)
		text := w.deliver(t, "/api/wechat", query, message)
		code := firstLine(text)
		if !regexp.MustCompile(`^\d{8}$`).MatchString(code) || code == old || !strings.Contains(text, "127.0.0.1:80") {
			t.Errorf("the answer is %q", text)
		}
		if again := w.deliver(t, "/api/wechat/", query, message); firstLine(again) != code {
			t.Errorf("the same message is answered with %q", again)
		}
		for _, test := range []struct {
			name, code, authorization, message, data string
			success                                  bool
		}{
			{"no token", code, "", "无权进行此操作，未登录或 token 无效", "", false},
			{"wrong token", code, "Bearer x", "无权进行此操作，未登录或 token 无效", "", false},
			{"no code", "", testAPIToken, "无效的参数", "", false},
			{"unknown code", "00000000", testAPIToken, "", "", true},
			{"code that another replaced", old, testAPIToken, "", "", true},
			{"the code", code, testAPIToken, "", "alice", true},
			{"used code", code, "Bearer " + testAPIToken, "", "", true},
		} {
			if got := w.user(t, test.code, test.authorization); got.Success != test.success ||
				got.Message != test.message || got.Data != test.data {
				t.Errorf("%s: %+v", test.name, got)
			}
		}
		if got := w.user(t, firstLine(w.say(t, "bob", "login")), "Bearer "+testAPIToken); got.Data != "bob" {
			t.Errorf("with Bearer: %+v", got)
		}
		if out := w.do("HEAD", "/api/wechat/user?code="+code, ""); out.Code != 405 {
			t.Errorf("HEAD: %d", out.Code)
		}
		menu := strings.Replace(pushXML("carol", "CLICK", "USER_VERIFICATION", ""), "<CreateTime>", "<CreateTime>9", 1)
		if w.config.aesKey == nil {
			got := w.deliver(t, "/api/wechat", mustQuery(t, w.signed()), []byte(menu))
			if got := w.user(t, firstLine(got), testAPIToken); got.Data != "carol" {
				t.Errorf("by the menu: %+v", got)
			}
		}
	})
}

func TestACodeLivesForThreeMinutesAndAReplayMakesNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "API_TOKEN="+testAPIToken)
		query, message, err := w.config.signedText("alice", "login")
		must(t, err)
		code := firstLine(w.deliver(t, "/api/wechat", query, message))
		time.Sleep(codeLife)
		if got := w.user(t, code, testAPIToken); !got.Success || got.Data != "" {
			t.Errorf("after three minutes: %+v", got)
		}
		if got := w.deliver(t, "/api/wechat", query, message); got != "" {
			t.Errorf("an old message is answered with %q", got)
		}
		if code = firstLine(w.say(t, "alice", "login")); w.user(t, code, testAPIToken).Data != "alice" {
			t.Error("a new message makes no code")
		}
	})
}

func TestGuessingCodesIsLimitedOverAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "API_TOKEN="+testAPIToken)
		code := firstLine(w.say(t, "alice", "login"))
		for i := range 100 {
			if got := w.user(t, "00000000", testAPIToken); got.Success != (i < maxMisses) {
				t.Fatalf("guess %d: %+v", i+1, got)
			}
		}
		if got := w.user(t, code, testAPIToken); got.Success || got.Data != "" || got.Message == "" {
			t.Errorf("a right guess beyond the limit: %+v", got)
		}
		time.Sleep(time.Minute)
		if got := w.user(t, code, testAPIToken); got.Data != "alice" {
			t.Errorf("a minute later: %+v", got)
		}
	})
}

func TestPictureWhoseScannerGetsACode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "API_TOKEN="+testAPIToken)
		for range 5 {
			out := w.do("GET", "/api/wechat/qrcode", "", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Dest", "image")
			if out.Code != 200 || out.Header().Get("Content-Type") != "image/png" {
				t.Fatalf("%d %s", out.Code, out.Body)
			}
		}
		if got := w.called("/cgi-bin/qrcode/create"); got != 1 {
			t.Errorf("five views cost %d calls", got)
		}
		for name, event := range map[string]string{"alice": "SCAN", "bob": "subscribe"} {
			key := map[string]string{"SCAN": "", "subscribe": "qrscene_"}[event] + codeScene.String()
			var reply struct{ Content string }
			must(t, xml.Unmarshal(w.push(pushXML(name, event, key, "")).Body.Bytes(), &reply))
			if got := w.user(t, firstLine(reply.Content), testAPIToken); got.Data != name {
				t.Errorf("%s: %+v, told %q", name, got, reply.Content)
			}
		}
		time.Sleep(codeQRLife / 2)
		w.do("GET", "/api/wechat/qrcode", "")
		if got := w.called("/cgi-bin/qrcode/create"); got != 2 {
			t.Errorf("half a day later, %d calls", got)
		}
	})
}

func TestWithoutAPITokenThereIsNoSuchProtocol(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/api/wechat", "/api/wechat/user?code=12345678", "/api/wechat/qrcode"} {
		if out := w.do("GET", path+"?"+w.signed(), "", "Authorization", ""); out.Code != 404 {
			t.Errorf("%s: %d", path, out.Code)
		}
	}
	if _, err := parseConfig(nil, with("API_TOKEN=fifteen-of-them"), t.Output()); err == nil ||
		strings.Contains(err.Error(), "fifteen") {
		t.Errorf("a short token: %v", err)
	}
}

// TestNewAPIsRequest is made over sockets, as one-api and new-api make it, with
// an address that ends in a slash.
func TestNewAPIsRequest(t *testing.T) {
	w := newWorld(t, "API_TOKEN="+testAPIToken)
	server := httptest.NewServer(w.handler)
	defer server.Close()
	for _, address := range []string{server.URL, server.URL + "/"} {
		code := firstLine(w.say(t, "alice", "验证码"))
		req, err := http.NewRequest("GET", fmt.Sprintf("%s/api/wechat/user?code=%s", address, code), nil)
		must(t, err)
		req.Header.Set("Authorization", testAPIToken)
		client := http.Client{Timeout: 5 * time.Second}
		resp, err := client.Do(req)
		must(t, err)
		var res struct {
			Success bool   `json:"success"`
			Message string `json:"message"`
			Data    string `json:"data"`
		}
		must(t, json.NewDecoder(resp.Body).Decode(&res))
		resp.Body.Close()
		if !res.Success || res.Data != "alice" {
			t.Errorf("%s: %+v", address, res)
		}
	}
}

func TestNoCodeCrossesBetweenPeople(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		begun := make([]codeTicket, 500)
		for i := range begun {
			begun[i] = w.beginCode(t)
		}
		var all sync.WaitGroup
		places := make(chan struct{}, len(begun))
		if w.redis != nil { // whose disk, on a busy machine, is too slow for all at once
			places = make(chan struct{}, 2*redisConns)
		}
		for i := range begun {
			all.Go(func() {
				places <- struct{}{}
				defer func() { <-places }()
				who := fmt.Sprint("user", i)
				w.say(t, who, begun[i].Code)
				if got := w.check(t, begun[i].Ticket, ""); got.OpenID != who {
					t.Errorf("%s's browser: %+v", who, got)
				}
				if got := w.user(t, firstLine(w.say(t, who, "验证码")), testAPIToken); got.Data != who {
					t.Errorf("%s's code: %+v", who, got)
				}
			})
		}
		all.Wait()
	})
}

func mustQuery(t testing.TB, query string) url.Values {
	t.Helper()
	values, err := url.ParseQuery(query)
	must(t, err)
	return values
}

func TestSignMakesThePushOfDigits(t *testing.T) {
	w := newWorld(t, "FLOWS=code")
	begun := w.beginCode(t)
	var out strings.Builder
	args := []string{"-ticket", begun.Ticket, "-openid", "alice", "-code", begun.Code}
	must(t, sign(args, only("WECHAT_TOKEN="+testToken), &out))
	line := regexp.MustCompile(`(/wechat/message\?\S+)' -H .* --data-binary '(.*)'`).FindStringSubmatch(out.String())
	if line == nil {
		t.Fatal(out.String())
	}
	w.do("POST", line[1], line[2])
	if got := w.check(t, begun.Ticket, ""); got.OpenID != "alice" {
		t.Errorf("%+v", got)
	}
}

func TestCheckKnowsWhatFlowCNeeds(t *testing.T) {
	w := newWorld(t)
	server := httptest.NewServer(w.handler)
	defer server.Close()
	w.config.publicURL = server.URL
	var out strings.Builder
	check(t.Context(), nil, only("FLOWS=code", "WECHAT_TOKEN="+testToken, "PUBLIC_URL="+server.URL,
		"WECHAT_API_BASE="+server.URL+"/demo"), &out)
	if got := out.String(); !strings.Contains(got, "✓ C: ready") || strings.Contains(got, "A: ") ||
		strings.Contains(got, "authorization domain") || strings.Contains(got, "access token") {
		t.Error(got)
	}
}

func TestASenderGetsFiveCodesAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "API_TOKEN="+testAPIToken)
		for i := range 10 {
			if got := w.say(t, "alice", "login"); (got != "") != (i < maxCodesSent) {
				t.Errorf("code %d: %q", i+1, got)
			}
		}
		if got := w.say(t, "bob", "login"); got == "" {
			t.Error("another sender gets none")
		}
	})
}
