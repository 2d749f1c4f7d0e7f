package main

import (
	"cmp"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"math/rand/v2"
	"net/http"
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
	peer := fmt.Sprintf("198.51.%d.%d:1", len(w.issued)/200, len(w.issued)%200)
	out := w.do("GET", "/wechat/getlogincode", "", "peer", peer)
	if err := json.Unmarshal(out.Body.Bytes(), &begun); err != nil || out.Code != 200 {
		t.Fatalf("getlogincode: %d %s", out.Code, out.Body)
	}
	w.issued = append(w.issued, begun.Ticket)
	return begun
}

// say sends a text as somebody; it returns what the phone shows, "" for nothing.
func (w *world) say(t testing.TB, openID, text string) string {
	t.Helper()
	return w.sayAgain(t, rand.Int64(), openID, text)
}

// sayAgain sends the message with that id, with a signature of its own.
func (w *world) sayAgain(t testing.TB, id int64, openID, text string) string {
	t.Helper()
	return w.deliver(t, fmt.Sprintf("<ToUserName>gh_1</ToUserName><FromUserName>%s</FromUserName>"+
		"<CreateTime>1</CreateTime><MsgType>text</MsgType><Content>%s</Content><MsgId>%d</MsgId>", openID, text, id))
}

// deliver pushes XML; it returns the answer's text, opened if it is sealed.
func (w *world) deliver(t testing.TB, inner string) string {
	t.Helper()
	query, body, err := w.config.signedBody(struct {
		XMLName struct{} `xml:"xml"`
		Inner   string   `xml:",innerxml"`
	}{Inner: inner})
	must(t, err)
	path := "/wechat/message"
	if w.config.apiToken != "" {
		path = "/api/wechat"
	}
	out := w.do("POST", path+"?"+query.Encode(), string(body))
	switch {
	case out.Code != 200:
		t.Errorf("a push: %d %s", out.Code, out.Body)
		return ""
	case out.Body.String() == "success":
		return ""
	}
	var reply struct{ Content, Encrypt string }
	must(t, xml.Unmarshal(out.Body.Bytes(), &reply))
	if w.config.aesKey != nil {
		opened, err := w.config.aesKey.open(reply.Encrypt, w.config.appID)
		must(t, err)
		must(t, xml.Unmarshal(opened, &reply))
	}
	return reply.Content
}

// A userAnswer is what a client of wechat-server's learns: the openid is in Data.
type userAnswer struct {
	Success       bool
	Message, Data string
}

// user asks as one-api and new-api do whose address of ours ends in a slash.
func (w *world) user(t testing.TB, code, authorization string) (answer userAnswer) {
	t.Helper()
	resp := send(&http.Client{Transport: w}, "GET", "http://wx.test//api/wechat/user?code="+code, "",
		"Authorization", authorization)
	equal(t, "the status", resp.StatusCode, 200)
	must(t, json.Unmarshal([]byte(resp.body), &answer))
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
			t.Setenv("WXSCAN_REDIS", startRedis(t).url())
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
				begun.ExpiresIn != 300 || !strings.HasSuffix(begun.QRURL, "/qr/code?username=gh_0123456789ab") {
				t.Errorf("%+v", begun)
			}
			id := rand.Int64()
			for range 3 { // WeChat sends again what is not answered in time
				if got := w.sayAgain(t, id, "alice", write(begun.Code)); !strings.Contains(got, "您已登录") {
					t.Errorf("%q: the phone shows %q", write(begun.Code), got)
				}
			}
			if got := w.say(t, "mallory", begun.Code); !strings.Contains(got, "数字不对") {
				t.Errorf("the second sender is told %q", got)
			}
			if got := w.check(t, begun.Ticket, ""); got.OpenID != "alice" || got.Token == "" {
				t.Errorf("%+v", got)
			}
			w.sayAgain(t, id, "alice", other.Code) // as if other digits were those of the message, meanwhile
			if got := w.check(t, other.Ticket, ""); got.Status != statusPending {
				t.Errorf("another browser: %+v", got)
			}
			w.wrongDigits = newGuessGuard(maxWrongDigits, maxAllWrongDigits, 10*time.Minute)
		}
	})
}

func TestDigitsAreConfirmedByTheLinkInTheReply(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		begun := w.beginCode(t)
		link := regexp.MustCompile(`/wechat/confirm\?s=\w+`)
		first := link.FindString(w.sayAgain(t, 1, "alice", begun.Code))
		again := link.FindString(w.sayAgain(t, 1, "alice", begun.Code))
		if out := w.do("GET", first, ""); out.Code != 200 || again != first {
			t.Fatalf("the links are %q and %q: %d", first, again, out.Code)
		}
		if got := w.check(t, begun.Ticket, ""); got.Status != statusScanned || got.Number == "" {
			t.Errorf("%+v", got)
		}
		if got := w.say(t, "mallory", begun.Code); strings.Contains(got, "confirm") {
			t.Errorf("another is told %q", got)
		}
	}, "CONFIRM=true")
}

func TestSimulatedPhoneAndSignSendTheDigits(t *testing.T) {
	w := newWorld(t, "FLOWS=code")
	for name, send := range map[string]func(codeTicket) string{
		"alice": func(begun codeTicket) string {
			_, shown := w.scan(begun.Ticket, "alice", "")
			return shown
		},
		"bob": func(begun codeTicket) string {
			return w.submit("/demo/chat", "openid", "bob", "content", begun.Code).Body.String()
		},
		"carol": func(begun codeTicket) string {
			var out strings.Builder
			args := []string{"-ticket", begun.Ticket, "-openid", "carol", "-code", begun.Code}
			must(t, sign(args, only("WECHAT_TOKEN="+testToken), &out))
			line := regexp.MustCompile(`(/wechat/message\?\S+)' -H .* --data-binary '(.*)'`)
			push := line.FindStringSubmatch(out.String())
			return w.do("POST", push[1], push[2]).Body.String()
		},
	} {
		begun := w.beginCode(t)
		shown := send(begun)
		if got := w.check(t, begun.Ticket, ""); got.OpenID != name || !strings.Contains(shown, "您已登录") {
			t.Errorf("%s: %+v, %s", name, got, shown)
		}
	}
	ticket := w.beginCode(t).Ticket
	for length, want := range map[int]int{0: 400, 64: 200, 65: 400} {
		status, _ := w.scan(ticket, strings.Repeat("o", length), "")
		equal(t, fmt.Sprint("an openid of ", length, " bytes"), status, want)
	}
	if out := w.submit("/demo/chat", "openid", "dave", "event", "subscribe"); !strings.Contains(out.Body.String(),
		"六位数字") {
		t.Errorf("who follows is told %s", out.Body)
	}
	for account, want := range map[string]int{"gh_0123456789ab": 200, "other": 404} {
		equal(t, account, w.do("GET", "/demo/qr/code?username="+account, "").Code, want)
	}
}

func TestWrongDigitsAreAnsweredFiveTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "FLOWS=code", "TICKET_TTL=1h")
		begun := w.beginCode(t)
		for i := range 20 {
			want := ""
			if i < 4 {
				want = "请发送登录页上的六位数字"
			} else if i == 4 {
				want = "请十分钟后再试"
			}
			got := w.sayAgain(t, int64(i), "mallory", wrongDigits(begun))
			if i < 4 {
				w.sayAgain(t, int64(i), "mallory", wrongDigits(begun)) // counts once
			}
			if !strings.Contains(got, want) || (got == "") != (want == "") {
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

// TestGuessersTogetherAreLimited has 1,000 senders guess. What counts is the first
// guess of each, and maxAllWrongDigits in all.
func TestGuessersTogetherAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "FLOWS=code", "TICKET_TTL=1h")
		begun, answered := w.beginCode(t), 0
		for range 2 {
			for i := range 1000 {
				if w.say(t, fmt.Sprint("mallory", i), wrongDigits(begun)) != "" {
					answered++
				}
			}
		}
		equal(t, "guesses that count", answered, 1000)
		if w.say(t, "mallory7", begun.Code); w.check(t, begun.Ticket, "").Login {
			t.Error("one of the guessers logs in")
		}
		if w.say(t, "alice", begun.Code); !w.check(t, begun.Ticket, "").Login {
			t.Error("who was never wrong does not log in")
		}
	})
}

func TestNumbersAreNobodyElses(t *testing.T) {
	s, taken, err := emptyStore(t, time.Minute, 100), "", error(nil)
	for err == nil {
		var n string
		n, err = s.keepUnderNumber(t.Context(), "digits", 1, record{Ends: time.Now().Add(time.Minute)})
		if err == nil && strings.Contains(taken, n) {
			t.Fatalf("%s is given twice", n)
		}
		taken += n
	}
	if err != errTooManyTickets {
		t.Errorf("when %q are taken: %v", taken, err)
	}
}

func wrongDigits(begun codeTicket) string {
	if begun.Code == "000000" {
		return "000001"
	}
	return "000000"
}

func TestOtherMessagesAreAnsweredWithSuccess(t *testing.T) {
	const code, api, both = "FLOWS=code", "API_TOKEN=" + testAPIToken, "FLOWS=code,scan"
	for _, test := range []struct{ setting, text, event, want string }{ // want: in the answer; "" is success
		{code, "hello", "", ""}, {code, "12345", "", ""}, {code, "1234567", "", ""}, {code, "12345a", "", ""},
		{code, "验证码", "", ""}, {code, "", "", ""}, {"", "123456", "", ""}, {api, "123456", "", ""},
		{api, "谢谢", "", ""}, {api, " 验证码\n", "", "三分钟"}, {api, "Login", "", "三分钟"},
		{api, "登录", "", "三分钟"},
		{both, "", "subscribe", "六位数字"}, {"", "", "subscribe", ""}, {both, "", "unsubscribe", ""},
	} {
		w := newWorld(t, test.setting)
		got := ""
		if test.event == "" {
			got = w.say(t, "alice", test.text)
		}
		for _, key := range []string{"", "last_trade_no_1"} {
			if test.event != "" {
				got = w.push(pushXML("alice", test.event, key, "")).Body.String()
			}
			if (got == "" || got == "success") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("%+v: %q", test, got)
			}
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
		equal(t, picture, w.do("GET", "/wechat/qr."+picture+"?ticket="+begun.Ticket, "").Code, 404)
	}
	w.push(pushXML("mallory", "SCAN", digest(begun.Ticket).String(), ""))
	if w.check(t, begun.Ticket, "").Login {
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
		equal(t, fmt.Sprint(test), out.Code, test.want)
	}
	equal(t, "where flow C is off", newWorld(t).do("GET", "/wechat/getlogincode", "").Code, 404)
}

func TestFlowCNeedsTheTokenAlone(t *testing.T) {
	few := []string{"WECHAT_TOKEN=" + testToken, "PUBLIC_URL=https://login.example.com"}
	for _, test := range []struct {
		settings []string
		wrong    string // the settings that are, a line each
	}{
		{[]string{"FLOWS=code"}, ""},
		{[]string{"FLOWS=code", "WECHAT_AES_KEY=" + docKey}, "WECHAT_APPID:"}, // which seals
		{[]string{"FLOWS=code,auth"}, "WECHAT_APPID: WECHAT_APPSECRET:"},
		{[]string{"FLOWS=code", "API_TOKEN=fifteen-of-them"}, "API_TOKEN:"},
	} {
		_, err := parseConfig(nil, only(append(test.settings, few...)...))
		var wrong []string
		for line := range strings.Lines(strings.TrimPrefix(fmt.Sprint(err), "<nil>")) {
			wrong = append(wrong, strings.Fields(line)[0])
		}
		if got := strings.Join(wrong, " "); got != test.wrong || strings.Contains(fmt.Sprint(err), "fifteen") {
			t.Errorf("%q: %v", test.settings, err)
		}
	}
	w := newWorld(t)
	w.config.appSecret = ""
	w.handler = w.routes()
	defer func() { w.config.appSecret = testSecret }()
	for _, path := range []string{"/wechat/getloginqr", "/wechat/getauthqr"} {
		equal(t, path+" without an appsecret", w.do("GET", path, "").Code, 404)
	}
	checked := newWorld(t)
	base := newLocalServer(t, checked.handler)
	checked.config.publicURL = base
	var out strings.Builder
	check(t.Context(), nil, only("FLOWS=code", few[0], "PUBLIC_URL="+base, "WECHAT_API_BASE="+base+"/demo"), &out)
	if got := out.String(); strings.Contains(got, "A: ") || strings.Contains(got, "authorization domain") ||
		strings.Contains(got, "access token") || !strings.Contains(got, "✓ C: ready") {
		t.Errorf("check says %s", got)
	}
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

func TestClientOfWeChatServer(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		old := firstLine(w.say(t, "alice", "验证码"))
		text := w.sayAgain(t, 1, "alice", "验证码")
		code := firstLine(text)
		if !regexp.MustCompile(`^\d{8}$`).MatchString(code) || code == old || !strings.Contains(text, "127.0.0.1:80") {
			t.Errorf("the answer is %q", text)
		}
		equal(t, "the same message is answered with", w.sayAgain(t, 1, "alice", "验证码"), text)
		byMenu := firstLine(w.deliver(t, "<FromUserName>bob</FromUserName><CreateTime>1</CreateTime>"+
			"<MsgType>event</MsgType><Event>CLICK</Event><EventKey>USER_VERIFICATION</EventKey>"))
		const token, noToken = testAPIToken, "无权进行此操作，未登录或 token 无效"
		const user = "/api/wechat/user?code="
		equal(t, "HEAD", w.do("HEAD", user+code, "", "Authorization", token).Code, 405)
		equal(t, "an unknown code", w.do("GET", user+"00000000", "", "Authorization", token).Body.String(),
			`{"success":true,"message":"","data":""}`+"\n")
		for _, test := range []struct {
			name, code, authorization string
			want                      userAnswer
		}{
			{"no token", code, "", userAnswer{Message: noToken}},
			{"wrong token", code, "Bearer x", userAnswer{Message: noToken}},
			{"no code", "", token, userAnswer{Message: "无效的参数"}},
			{"code that another replaced", old, token, userAnswer{Success: true}},
			{"the code", code, token, userAnswer{Success: true, Data: "alice"}},
			{"used code", code, "Bearer " + token, userAnswer{Success: true}},
			{"code by the menu, with Bearer", byMenu, "Bearer " + token, userAnswer{Success: true, Data: "bob"}},
		} {
			equal(t, test.name, w.user(t, test.code, test.authorization), test.want)
		}
		equal(t, "codes sent", w.metrics.counts[`wxscan_tickets_total{flow="api"}`], 3)
	})
}

func TestCodesEndAndAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "API_TOKEN="+testAPIToken)
		whose := func(code string) userAnswer { return w.user(t, code, testAPIToken) }
		first, other := firstLine(w.sayAgain(t, 1, "alice", "login")), firstLine(w.say(t, "carol", "login"))
		time.Sleep(3*time.Minute - 1)
		equal(t, "in time", whose(other).Data, "carol")
		time.Sleep(time.Nanosecond)
		equal(t, "after three minutes", whose(first), userAnswer{Success: true})
		equal(t, "the old message is answered with", w.sayAgain(t, 1, "alice", "login"), "")
		last := ""
		for i := range 10 {
			text := w.say(t, "alice", "login")
			equal(t, fmt.Sprintf("code %d is sent", i+1), text != "", i < 5)
			last = cmp.Or(firstLine(text), last)
		}
		if w.say(t, "bob", "login") == "" {
			t.Error("another sender gets none")
		}
		for i := range 100 {
			equal(t, fmt.Sprintf("guess %d", i+1), whose("00000000").Success, i < 29) // with the one above
		}
		if got := whose(last); got.Success || got.Data != "" || got.Message == "" {
			t.Errorf("a right guess beyond the limit: %+v", got)
		}
		time.Sleep(time.Minute)
		equal(t, "a minute later", whose(last).Data, "alice")
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
		equal(t, "calls for five views", w.called("/cgi-bin/qrcode/create"), 1)
		for event, key := range map[string]string{"SCAN": "", "subscribe": "qrscene_"} {
			var reply struct{ Content string }
			push := w.push(pushXML(event+"er", event, key+codeScene.String(), ""))
			must(t, xml.Unmarshal(push.Body.Bytes(), &reply))
			equal(t, event, w.user(t, firstLine(reply.Content), testAPIToken).Data, event+"er")
		}
		time.Sleep(codeQRLife / 2)
		w.do("GET", "/api/wechat/qrcode", "")
		equal(t, "calls half a day later", w.called("/cgi-bin/qrcode/create"), 2)
	})
}

func TestWithoutAPITokenThereIsNoSuchProtocol(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/api/wechat", "/api/wechat/user?code=12345678", "/api/wechat/qrcode"} {
		equal(t, path, w.do("GET", path+"?"+w.signed(), "", "Authorization", "").Code, 404)
	}
}

// TestNoCodeCrossesBetweenPeople has 500 people in all log in and get a code at once.
func TestNoCodeCrossesBetweenPeople(t *testing.T) {
	eachStore(t, func(t *testing.T, w *world) {
		var all sync.WaitGroup
		for i := range 125 {
			begun := w.beginCode(t)
			all.Go(func() {
				who := fmt.Sprint("user", i)
				w.say(t, who, begun.Code)
				equal(t, "who is logged in", w.check(t, begun.Ticket, "").OpenID, who)
				id, answers := rand.Int64(), make(chan string, 2)
				for range cap(answers) { // the message comes again at once
					go func() { answers <- firstLine(w.sayAgain(t, id, who, "验证码")) }()
				}
				code, again := <-answers, <-answers
				if code != again && code != "" && again != "" {
					t.Errorf("one message is answered with %s and %s", code, again)
				}
				code = cmp.Or(code, again)
				equal(t, "whose code it is", w.user(t, code, testAPIToken).Data, who)
			})
		}
		all.Wait()
	})
}
