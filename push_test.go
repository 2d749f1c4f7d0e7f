package main

import (
	"encoding/xml"
	"fmt"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const badSignature = "signature=x&timestamp=1&nonce=2"

// knock sends a push or, with GET, the check of the interface URL from a client. It
// returns the status.
func (w *world) knock(method, query, peer string) int {
	return w.do(method, "/wechat/message?"+query, "<xml></xml>", "peer", peer).Code
}

func TestWhoGuessesTheTokenIsShutOut(t *testing.T) {
	const guesser, weChat = "203.0.113.7:1", "198.51.100.9:1"
	for _, settings := range [][]string{nil, {"WECHAT_AES_KEY=" + docKey}} {
		for _, method := range []string{"GET", "POST"} {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, settings...)
				for i := range 2 * maxWrong {
					want := 403
					if i >= maxWrong {
						want = 429
					}
					equal(t, fmt.Sprintf("%s, guess %d", method, i), w.knock(method, badSignature, guesser), want)
				}
				qr := w.begin(t, "getloginqr")
				query, push, err := w.config.signedPush("mallory", "SCAN", digest(qr.Ticket).String(), "")
				must(t, err)
				wrong := w.do(method, "/wechat/message?"+badSignature, "<xml></xml>", "peer", guesser)
				guessed := w.do(method, "/wechat/message?"+query.Encode(), string(push), "peer", guesser)
				if guessed.Code != 429 || guessed.Body.String() != wrong.Body.String() ||
					guessed.Header().Get("Retry-After") != "60" || w.check(t, qr.Ticket, "").Login {
					t.Errorf("%s: a right guess is told from a wrong one: %d %s", method, guessed.Code, guessed.Body)
				}
				equal(t, "WeChat meanwhile", w.knock("GET", w.signed(), weChat), 200)
				time.Sleep(time.Minute)
				equal(t, "a right signature after a minute", w.knock("GET", w.signed(), guesser), 200)
			})
		}
	}
}

func TestGuessersAreToldApartAsFarAsTheyCanBe(t *testing.T) {
	const elsewhere = "198.51.100.9:1"
	for _, test := range []struct {
		name, peer   string // another in each guess
		most         int
		right, again int // the status of a right signature then, and of a second guess from elsewhere
	}{
		{"an IPv6 network", "[2001:db8:1:%x::1]:1", 10 * maxWrong, 429, 403},
		{"all behind a local proxy that names nobody", "127.0.0.1:%d", 10 * maxWrong, 200, 403},
		{"all behind a proxy in a private network", "172.17.0.1:%d", maxWrong, 200, 403},
		{"everybody, each of whom has one guess", "[2001:db8:%x::1]:1", maxAllWrong, 429, 429},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			guess := func(i int) int { return w.knock("GET", badSignature, fmt.Sprintf(test.peer, i)) }
			for i := range test.most {
				equal(t, fmt.Sprintf("%s, guess %d", test.name, i), guess(i), 403)
			}
			equal(t, test.name+", one guess more", guess(0), 429)
			equal(t, test.name+", a right one", w.knock("GET", w.signed(), fmt.Sprintf(test.peer, 0)), test.right)
			equal(t, test.name+", a right one from elsewhere", w.knock("GET", w.signed(), elsewhere), 200)
			equal(t, test.name+", a guess from elsewhere", w.knock("GET", badSignature, elsewhere), 403)
			equal(t, test.name+", another", w.knock("GET", badSignature, elsewhere), test.again)
		})
	}
}

// A network of /64s that was wrong a few times is not taken for one that never was.
func TestEverybodysLimitHoldsForWholeNetworks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range maxAllWrong {
			w.knock("GET", badSignature, fmt.Sprintf("[2001:db8:%x::1]:1", i))
		}
		for i := range 11 {
			want := 403
			if i == 10 {
				want = 429
			}
			peer := fmt.Sprintf("[2001:db8:ffff:%x::1]:1", i)
			equal(t, fmt.Sprintf("guess %d", i), w.knock("GET", badSignature, peer), want)
		}
	})
}

func TestSafeModeReadsNoXMLOfAWrongSignature(t *testing.T) {
	w := newWorld(t, "WECHAT_AES_KEY="+docKey)
	qr := w.begin(t, "getloginqr")
	query, push, err := w.config.signedPush("alice", "SCAN", "s", qr.Ticket)
	must(t, err)
	body := strings.NewReader(string(push))
	send := func(query url.Values) int {
		out := httptest.NewRecorder()
		w.handler.ServeHTTP(out, httptest.NewRequest("POST", "/wechat/message?"+query.Encode(), body))
		return out.Code
	}
	good := query.Get("signature")
	query.Set("signature", "x")
	if status := send(query); status != 403 || body.Len() != len(push) {
		t.Errorf("%d, and %d bytes of %d are read", status, len(push)-body.Len(), len(push))
	}
	for range maxWrong {
		w.knock("POST", badSignature, "192.0.2.1:1") // send's own address
	}
	query.Set("signature", good)
	if status := send(query); status != 429 || body.Len() != len(push) {
		t.Errorf("of a client that is shut out: %d, and %d bytes are read", status, len(push)-body.Len())
	}
	w.badSignatures = newGuessGuard(maxWrong, maxAllWrong, time.Minute)
	if status := send(query); status != 200 || !w.check(t, qr.Ticket, "").Login {
		t.Errorf("with the right one: %d", status)
	}
}

func TestASignatureIsRememberedWhileItIsFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		sent := strconv.FormatInt(time.Now().Add(10*time.Minute).Unix(), 10) // as early as it may be
		must(t, w.admit(t.Context(), "s", []byte("a")))
		for w.config.isFresh(sent) {
			if w.admit(t.Context(), "s", []byte("b")) == nil {
				t.Fatal("a signature is forgotten while it is fresh")
			}
			must(t, w.admit(t.Context(), time.Now().String(), nil))
			time.Sleep(time.Second)
		}
		if n := w.seen.count.Load(); n > 1204 {
			t.Errorf("%d pushes are kept, want those of 20 minutes", n)
		}
		for i := range maxPushes + 1 { // the last ones, in a full memory, pass too
			must(t, w.admit(t.Context(), strconv.Itoa(i), nil))
		}
		if w.admit(t.Context(), "0", []byte("another")) == nil || w.seen.count.Load() != maxPushes {
			t.Errorf("a full memory keeps %d, and does not know them", w.seen.count.Load())
		}
	})
}

func TestPassiveReplyGoesToTheFirstWhoHasScanned(t *testing.T) {
	w := newWorld(t)
	qr := w.begin(t, "getloginqr")
	var reply event
	must(t, xml.Unmarshal(w.push(pushXML("alice", "SCAN", "s", qr.Ticket)).Body.Bytes(), &reply))
	sent, err := strconv.ParseInt(reply.CreateTime, 10, 64)
	if reply.ToUserName != "alice" || reply.FromUserName != "gh_1" || reply.MsgType != "text" || err != nil ||
		time.Since(time.Unix(sent, 0)) > time.Minute {
		t.Errorf("%+v", reply)
	}
	equal(t, "the second to scan is told", w.push(pushXML("bob", "SCAN", "s", qr.Ticket)).Body.String(), "success")
	equal(t, "logged in", w.check(t, qr.Ticket, "").OpenID, "alice")
}

func TestAPushIsMatchedByItsScene(t *testing.T) {
	w := newWorld(t)
	auth := w.begin(t, "getauthqr")
	const weChats = "gQH47joAAA=="
	for _, test := range []struct {
		name, openID, event, key, ticket string // in key and ticket, [T] is our ticket, [D] its digest
		login                            bool
	}{
		{"by the scene, as WeChat pushes", "alice", "sCaN", "[D]", weChats, true},
		{"by the scene, of somebody new", "alice", "Subscribe", "qrscene_[D]", "", true},
		{"by our ticket, with curl", "alice", "SCAN", "123", "[T]", true},
		{"by the scene, before the ticket", "alice", "SCAN", "[D]", w.begin(t, "getloginqr").Ticket, true},
		{"the ticket as scene", "alice", "SCAN", "[T]", "", false},
		{"the digest as Ticket", "alice", "SCAN", "", "[D]", false},
		{"a plain follow", "alice", "subscribe", "", "", false},
		{"a follow after a payment", "alice", "subscribe", "last_trade_no_1", "[T]", false},
		{"nobody", "", "SCAN", "[D]", "", false},
		{"another event", "alice", "unsubscribe", "[D]", "[T]", false},
		{"the ticket of flow B", "alice", "SCAN", digest(auth.Ticket).String(), auth.Ticket, false},
	} {
		qr := w.begin(t, "getloginqr")
		fill := strings.NewReplacer("[T]", qr.Ticket, "[D]", digest(qr.Ticket).String())
		out := w.push(fill.Replace(pushXML(test.openID, test.event, test.key, test.ticket)))
		got := w.check(t, qr.Ticket, "").Login
		if got != test.login || out.Code != 200 || (out.Body.String() == "success") == test.login {
			t.Errorf("%s: login %v, answered %d %s", test.name, got, out.Code, out.Body)
		}
	}
	qr := w.begin(t, "getloginqr")
	push := pushXML("alice", "SCAN", "s", qr.Ticket)
	sealed := testKey(t, docKey).seal(make([]byte, 16), []byte(push), w.config.appID)
	w.push("<xml><Encrypt>" + sealed + "</Encrypt></xml>")
	w.push(strings.Replace(push, "<MsgType>event", "<MsgType>text", 1))
	if a, b := w.check(t, qr.Ticket, ""), w.check(t, auth.Ticket, ""); a.Login || b.Login {
		t.Errorf("sealed without a key, or a message, logs in: %+v; a push, flow B: %+v", a, b)
	}
}

func TestSafeModeIsOursToDecide(t *testing.T) {
	w := newWorld(t, "WECHAT_AES_KEY="+docKey)
	qr := w.begin(t, "getloginqr")
	seal := func(openID, appID, token string, age time.Duration) (query url.Values, body string) {
		message := pushXML(openID, "SCAN", "s", qr.Ticket)
		encrypt := w.config.aesKey.seal([]byte("0123456789abcdef"), []byte(message), appID)
		query, err := url.ParseQuery(w.signedAt(time.Now().Add(-age)))
		must(t, err)
		query.Set("msg_signature", signature(token, query.Get("timestamp"), query.Get("nonce"), encrypt))
		return query, "<xml><Encrypt>" + encrypt + "</Encrypt></xml>"
	}
	otherAppID, otherAppIDBody := seal("mallory", "wx0000000000000000", w.config.token, 0)
	badToken, badTokenBody := seal("mallory", w.config.appID, "other", 0)
	good, goodBody := seal("alice", w.config.appID, w.config.token, 0)
	_, otherBody := seal("mallory", w.config.appID, w.config.token, 0)
	old, oldBody := seal("mallory", w.config.appID, w.config.token, 11*time.Minute)
	answers := make(map[string]bool)
	for name, push := range map[string][2]string{
		"plain, claiming to be plain": {w.signed() + "&encrypt_type=raw", pushXML("mallory", "SCAN", "s", qr.Ticket)},
		"sealed for another appid":    {otherAppID.Encode(), otherAppIDBody},
		"signed with another Token":   {badToken.Encode(), badTokenBody},
		"not what was signed":         {good.Encode(), otherBody},
		"too old":                     {old.Encode(), oldBody},
		"not XML":                     {good.Encode(), "hello"},
	} {
		out := w.do("POST", "/wechat/message?"+push[0], push[1])
		if answers[out.Body.String()] = true; out.Code != 403 || len(answers) != 1 {
			t.Errorf("%s: %d %s, want 403, and the same for all: %v", name, out.Code, out.Body, answers)
		}
	}
	// What stands beside the sealed part does not count, be it XML or a signature.
	good.Del("signature")
	goodBody = strings.Replace(goodBody, "<xml>", "<xml><FromUserName>mallory</FromUserName>", 1)
	w.do("POST", "/wechat/message?"+good.Encode(), goodBody)
	equal(t, "logged in", w.check(t, qr.Ticket, "").OpenID, "alice")
}

func TestPushIsFreshWithinTheSkew(t *testing.T) {
	for _, test := range []struct {
		setting string
		off     time.Duration
		status  int
	}{
		{"", 10*time.Minute - time.Second, 200}, {"", -10 * time.Minute, 200}, {"", 11 * time.Minute, 403},
		{"", -11 * time.Minute, 403}, {"1m", 61 * time.Second, 403}, {"0", 1000 * time.Hour, 200},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, "PUSH_MAX_SKEW="+test.setting)
			qr := w.begin(t, "getloginqr")
			query := w.signedAt(time.Now().Add(-test.off))
			out := w.do("POST", "/wechat/message?"+query, pushXML("alice", "SCAN", "s", qr.Ticket))
			if out.Code != test.status || w.check(t, qr.Ticket, "").Login != (test.status == 200) {
				t.Errorf("%v off, PUSH_MAX_SKEW %q: %d, want %d", test.off, test.setting, out.Code, test.status)
			}
			if test.status == 403 && !strings.Contains(w.logged.String(), "clock skew") {
				t.Error("the log has no word of clock skew")
			}
		})
	}
	w := newWorld(t)
	for _, at := range []string{"", "x", "9223372036854775807", "-9223372036854775808", "99999999999999999999"} {
		query := url.Values{"timestamp": {at}, "nonce": {"n"}, "signature": {signature(w.config.token, at, "n")}}
		equal(t, "timestamp "+at, w.do("POST", "/wechat/message?"+query.Encode(), "<xml/>").Code, 403)
	}
}

func TestOneSignatureCarriesOneBody(t *testing.T) {
	w := newWorld(t)
	first, second, query := w.begin(t, "getloginqr"), w.begin(t, "getloginqr"), w.signed()
	for _, test := range []struct {
		name, body, want string
		status           int
	}{
		{"a push", pushXML("alice", "SCAN", "s", first.Ticket), "您已登录", 200},
		{"a retry", pushXML("alice", "SCAN", "s", first.Ticket), "success", 200},
		{"another body", pushXML("mallory", "SCAN", "s", second.Ticket), "bad_signature", 403},
	} {
		out := w.do("POST", "/wechat/message?"+query, test.body)
		if out.Code != test.status || !strings.Contains(out.Body.String(), test.want) {
			t.Errorf("%s: %d %s", test.name, out.Code, out.Body)
		}
	}
	equal(t, "a captured signature logs in", w.check(t, second.Ticket, "").Login, false)
}

func TestHostilePushes(t *testing.T) {
	const entities = `<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>`
	w := newWorld(t)
	for name, body := range map[string]string{
		"entity bomb":  entities + "<xml><Event>&b;</Event></xml>",
		"outer entity": entities + "<xml><Event>&c;</Event></xml>",
		"depth":        "<xml>" + strings.Repeat("<a>", 16000),
		"bad UTF-8":    "<xml><Event>\xff\xfe</Event></xml>",
		"GBK":          `<?xml version="1.0" encoding="GBK"?><xml></xml>`,
		"attributes":   "<xml " + strings.Repeat(`a="b" `, 9000) + ">",
		"two roots":    "<xml></xml><xml></xml>",
		"long lines":   "<xml><" + strings.Repeat("界\n", 10_000),
		"a long name":  "<xml><a></" + strings.Repeat("b", 60_000) + ">",
	} {
		equal(t, name, w.push(body).Code, 400)
	}
	for line := range strings.Lines(w.logged.String()) {
		if len(line) > 1500 || !strings.Contains(line, "level=") {
			t.Errorf("a line of %d bytes: %.100s", len(line), line)
		}
	}
	for _, target := range []string{
		"/wechat/checklogin?ticket=" + strings.Repeat("x", 30000), "/wechat/checklogin?%zz;;&=&ticket=%",
		"/wechat/accessusercode?state=" + strings.Repeat("x", 30000) + "&code=y", "/wechat/qr.png?ticket=%ff%fe%00",
		"/wechat/message?" + strings.Repeat("%00", 5000), "/static/" + strings.Repeat("../", 1000),
	} {
		if out := w.do("GET", target, ""); out.Code >= 500 {
			t.Errorf("%.50s: %d", target, out.Code)
		}
	}
}

// FuzzDecodeXML: no push crashes us, and what is accepted has the root xml.
func FuzzDecodeXML(f *testing.F) {
	for _, seed := range []string{pushXML("o", "SCAN", "k", "t"), "<xml></xml>x", strings.Repeat("<a>", 20000),
		"<!DOCTYPE a [<!ENTITY b \"c\">]><xml>&b;</xml>", "<xml><Event>a</Event><Event>b</Event></xml>", "\xff\xfe"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var push event
		if err := decodeXML(data, &push); err != nil {
			return
		}
		if push.XMLName.Local != "xml" {
			t.Errorf("accepted a root %q", push.XMLName.Local)
		}
		push.scan()
		reply, err := (&config{}).passiveReply(&push, "hello")
		if err != nil || !slices.Equal(reply[:5], []byte("<xml>")) {
			t.Errorf("reply %q, %v", reply, err)
		}
	})
}
