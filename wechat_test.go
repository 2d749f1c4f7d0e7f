package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// at is a fault of the calls whose path ends so.
func at(path string, fault http.HandlerFunc) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, path) {
			return false
		}
		fault(w, r)
		return true
	}
}

func TestCallersShareOneTokenFetchAndForASecondItsFailure(t *testing.T) {
	const stable = "/cgi-bin/stable_token"
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		all := func(want error) (took time.Duration) {
			start := time.Now()
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					token, err := w.wechat.accessToken(t.Context())
					if !errors.Is(err, want) || err == nil && len(token) < 100 {
						t.Errorf("%q, %v, want %v", token, err, want)
					}
				})
			}
			wg.Wait()
			return time.Since(start)
		}
		w.setFault(at(stable, hang))
		time.AfterFunc(time.Second, func() { // while the others wait
			hurried, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := w.wechat.accessToken(hurried)
			equal(t, "hurried", err, errTimeout)
			equal(t, "the hurried caller's time", hurried.Err(), context.DeadlineExceeded)
		})
		equal(t, "all hear of the failure after", all(errTimeout), callTimeout)
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(2 * time.Second); return false })
		time.Sleep(holdOff - 1)
		equal(t, "and again, after", all(errTimeout), 0)
		equal(t, "fetches", w.called(stable), 1)
		time.Sleep(time.Nanosecond)
		equal(t, "all get the token after", all(nil), 2*time.Second)
		equal(t, "fetches", w.called(stable), 2)
	})
}

func TestTokenIsUsedUntilItEndsAndOnlyWhoRenewsItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first, err := w.wechat.accessToken(t.Context())
		must(t, err)
		time.Sleep(115 * time.Minute)
		w.setFault(refusing("token", 45009, "reach max api daily quota limit"))
		kept, err := w.wechat.accessToken(t.Context())
		must(t, err)
		equal(t, "when it cannot be renewed", kept, first)
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(3 * time.Second); return false })
		time.Sleep(holdOff)
		start, renewed := time.Now(), make(chan string)
		go func() {
			token, _ := w.wechat.accessToken(t.Context())
			renewed <- token
		}()
		synctest.Wait()
		if token, _ := w.wechat.accessToken(t.Context()); token != first || time.Since(start) != 0 {
			t.Errorf("the old token is good, yet who does not renew it waits %v", time.Since(start))
		}
		if got := <-renewed; got == first || w.called("/cgi-bin/stable_token") != 3 {
			t.Errorf("whoever renews the token gets %q, by %d fetches", got, w.called("/cgi-bin/stable_token"))
		}
		w.setFault(refusing("token", 40164, "invalid ip"))
		time.Sleep(2 * time.Hour)
		out := w.do("GET", "/wechat/getloginqr", "")
		if got := w.called("/cgi-bin/qrcode/create"); !strings.Contains(out.Body.String(), "40164") || got != 0 {
			t.Errorf("when it has ended: %s, %d calls of create", out.Body, got)
		}
	})
}

func TestTokenLives(t *testing.T) {
	for expiresIn, good := range map[string]time.Duration{ // how long it serves without another fetch
		"7200": 6900 * time.Second, "600": 400 * time.Second, "2": 40 * time.Second, "-5": 40 * time.Second,
		"1e300": 6900 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
				if asked, _ := io.ReadAll(r.Body); !strings.Contains(string(asked), `"force_refresh":false`) {
					t.Errorf("a token is forced: %s", asked)
				}
				fmt.Fprintf(rw, `{"access_token":"t","expires_in":%s}`, expiresIn)
				return true
			})
			for i, pause := range []time.Duration{0, good - 1, 1} {
				time.Sleep(pause)
				w.wechat.accessToken(t.Context())
				if got := w.called("/cgi-bin/stable_token"); got != 1+i/2 {
					t.Errorf("expires_in %s, call %d: %d fetches", expiresIn, i, got)
				}
			}
		})
	}
}

func TestStableTokenFallsBackWhereItIsNotOffered(t *testing.T) {
	for answer, fallsBack := range map[string]bool{
		"": true, `{"errcode":48004,"errmsg":"no such api"}`: true,
		`{"errcode":40013}`: false, `{"errcode":40001}`: false, `{"errcode":40164}`: false, `{"errcode":45009}`: false,
		`{"errcode":-1}`: false, `<html>`: false,
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(saying("/stable_token", answer))
			if answer == "" {
				w.setFault(at("/stable_token", http.NotFound))
			}
			_, err := w.wechat.accessToken(t.Context())
			if got := w.called("/cgi-bin/token") == 1; got != fallsBack || (err == nil) != fallsBack {
				t.Errorf("%s: falls back %v, want %v; %v", answer, got, fallsBack, err)
			}
		})
	}
}

func TestRefusedTokenIsRenewedOnceWithoutAStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "QR_RATE=0")
		refused, err := w.wechat.accessToken(t.Context())
		must(t, err)
		// A stable token that is refused has been replaced on WeChat's side.
		refuse := refusing("/qrcode/create", 42001, "access_token is invalid")
		var refusals atomic.Int32
		w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
			if r.URL.Query().Get("access_token") != refused {
				return at("/stable_token", http.NotFound)(rw, r) // so that a plain, new one is fetched
			}
			time.Sleep(time.Duration(refusals.Add(1)) * time.Millisecond) // most come after the renewal
			return refuse(rw, r)
		})
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { w.begin(t, "getloginqr") })
		}
		wg.Wait()
		equal(t, "renewals for 20 callers", w.called("/cgi-bin/token"), 1)

		w.setFault(refusing("/qrcode/create", 40001, "access_token is invalid"))
		for range 100 { // over 10 seconds
			if out := w.do("GET", "/wechat/getloginqr", ""); !strings.Contains(out.Body.String(), "wechat_refused") {
				t.Errorf("%d %s", out.Code, out.Body)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if got := w.called("/cgi-bin/stable_token"); got < 5 || got > 12 {
			t.Errorf("%d token fetches while all are refused for 10 s", got)
		}
		w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
			time.Sleep(2 * holdOff)
			return refuse(rw, r)
		})
		tries := w.called("/cgi-bin/qrcode/create")
		w.do("GET", "/wechat/getloginqr", "")
		equal(t, "tries where WeChat is slow to refuse", w.called("/cgi-bin/qrcode/create")-tries, 2)
		w.setFault(nil)
		w.begin(t, "getloginqr")
	})
}

func TestBusyIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var busy atomic.Int32
		w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
			if busy.Add(-1) < 0 {
				return false
			}
			io.WriteString(rw, `{"errcode":-1,"errmsg":"system error"}`)
			return true
		})
		busy.Store(2)
		w.begin(t, "getloginqr")
		busy.Store(3)
		start := time.Now()
		if out := w.do("GET", "/wechat/getloginqr", ""); out.Code != 502 || time.Since(start) != 600*time.Millisecond {
			t.Errorf("busy three times: %d after %v", out.Code, time.Since(start))
		}
		qr := w.begin(t, "getauthqr")
		busy.Store(1)
		_, shown := w.scan(qr.Ticket, "alice", "")
		if got := w.called("/sns/oauth2/access_token"); !strings.HasSuffix(shown, "reason=unavailable") || got != 1 {
			t.Errorf("a code is exchanged %d times; %s", got, shown)
		}
	})
}

func TestQRCodesAreOfTheTicketsLife(t *testing.T) {
	w := newWorld(t, "TICKET_TTL=90s")
	var asked []byte
	w.setFault(at("/create", func(rw http.ResponseWriter, r *http.Request) {
		asked, _ = io.ReadAll(r.Body)
		io.WriteString(rw, `{"ticket":"t","url":"http://weixin.qq.com/q/1"}`)
	}))
	qr := w.begin(t, "getloginqr")
	equal(t, "asked", string(asked), `{"action_info":{"scene":{"scene_str":"`+digest(qr.Ticket).String()+`"}},`+
		`"action_name":"QR_STR_SCENE","expire_seconds":90}`)
}

func TestAuthorizeURL(t *testing.T) {
	c := wechat{appID: "wx1", openBase: "https://open.weixin.qq.com", scope: "snsapi_base"}
	const want = "https://open.weixin.qq.com/connect/oauth2/authorize?appid=wx1&redirect_uri=https%3A%2F%2F" +
		"login.example.com%2Fwechat%2Faccessusercode&response_type=code&scope=snsapi_base&state=abc#wechat_redirect"
	if got := c.authorizeURL("https://login.example.com/wechat/accessusercode", "abc"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestEveryKnownErrcodeIsOfAKindWithAHint(t *testing.T) {
	for want, codes := range map[kind][]int{
		kindBusy: {-1}, kindAccount: {40013, 40002, 41002, 40125, 40243, 41004, 48001, 50002},
		kindToken: {40001, 40014, 42001}, kindIP: {40164, 61004, 89503}, kindQuota: {45009, 45011},
		kindInvalid: {40029, 42003}, kindUsed: {40163},
	} {
		for _, code := range codes {
			got, english, chinese := meaning(&apiError{path: "/cgi-bin/qrcode/create", code: code})
			if got != want || english == "" || chinese == "" {
				t.Errorf("errcode %d: %q, %q, %q", code, got, english, chinese)
			}
		}
	}
	for _, path := range []string{"/cgi-bin/stable_token", "/cgi-bin/token"} {
		if got := kindOf(&apiError{path: path, code: 40001}); got != kindAccount {
			t.Errorf("40001 from %s: %q", path, got)
		}
	}
}

// raw answers with bytes of its own, and closes or resets the connection.
func raw(answer string, reset bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		io.WriteString(conn, answer)
		if tcp, ok := conn.(*net.TCPConn); ok && reset {
			tcp.SetLinger(0)
		}
		conn.Close()
	}
}

// Three requests in a row run into each fault of WeChat's. Each is answered within 10
// seconds by what a client can understand, while a push and a parked poll do not
// notice; after recovery all is well.
func TestWeChatsFaults(t *testing.T) {
	const unreachable, refused, timeout = "502 wechat_unreachable", "502 wechat_refused", "504 wechat_timeout"
	for _, test := range []struct {
		name    string
		fault   http.HandlerFunc
		want    string
		calls   int  // at most, of the path at fault
		sockets bool // the fault needs real ones
	}{
		{"hangs", hang, timeout, 3, false},
		{"resets", raw("", true), unreachable, 6, true}, // the transport tries a GET twice
		{"truncated", raw("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"access_token\":\"t\"", false),
			unreachable, 3, true},
		{"null", page(200, "", "null"), unreachable, 3, false},
		{"wrong types", page(200, "", `{"access_token":7,"ticket":{},"openid":[],"expires_in":"x"}`),
			unreachable, 3, false},
		{"8 MiB", page(200, "", strings.Repeat(" ", 8<<20)+`{"access_token":"t","ticket":"t","url":"u","openid":"o"}`),
			unreachable, 3, true},
		{"503 with JSON", page(503, "", `{"access_token":"t","ticket":"t","url":"u","openid":"mallory"}`),
			unreachable, 3, false},
		{"busy", page(200, "", `{"errcode":-1,"errmsg":"system error"}`), refused, 9, false},
		{"refused", page(200, "", `{"errcode":45009,"errmsg":"reach max api daily quota limit"}`), refused, 3, false},
	} {
		for _, path := range []string{"/cgi-bin/stable_token", "/cgi-bin/qrcode/create", "/sns/oauth2/access_token"} {
			fails := func(t *testing.T) {
				w := newWorld(t)
				if test.sockets {
					w.wechat.client, w.wechat.apiBase = newHTTPClient(), newLocalServer(t, w.handler)+"/demo"
				}
				auth, parked := w.begin(t, "getauthqr"), make(chan pollAnswer, 1)
				go func() { parked <- w.check(t, auth.Ticket, "30") }()
				w.setFault(at(path, test.fault))
				for i := range 3 {
					start := time.Now()
					if strings.HasPrefix(path, "/sns/") {
						back := fmt.Sprintf("/wechat/accessusercode?code=%d&state=%v", i, digest(auth.Ticket))
						_, reason, _ := strings.Cut(w.do("GET", back, "").Header().Get("Location"), "reason=")
						equal(t, "the callback's reason", reason, "unavailable")
					} else {
						out := w.do("GET", "/wechat/getloginqr", "")
						var answer struct{ Error string }
						json.Unmarshal(out.Body.Bytes(), &answer)
						equal(t, "getloginqr", fmt.Sprint(out.Code, " ", answer.Error), test.want)
					}
					if took := time.Since(start); took > 10*time.Second {
						t.Errorf("took %v", took)
					}
					equal(t, "a push", w.push(pushXML("o", "SCAN", "s", "x")).Body.String(), "success")
				}
				if got := w.called(path); got > test.calls {
					t.Errorf("%d calls, want at most %d", got, test.calls)
				}
				w.setFault(nil)
				time.Sleep(holdOff)
				w.begin(t, "getloginqr")
				w.scan(auth.Ticket, "alice", "")
				equal(t, "the parked poll", (<-parked).OpenID, "alice")
			}
			t.Run(test.name+path, func(t *testing.T) {
				if test.sockets {
					t.Parallel()
					fails(t)
				} else {
					synctest.Test(t, fails)
				}
			})
		}
	}
}

func TestSecretsAndStrangeAnswersAreNeitherSentOnNorQuoted(t *testing.T) {
	var followed atomic.Int32
	elsewhere := newLocalServer(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	var bases []string
	for _, answer := range []string{`{"access_token":"SECRET"}`, "HTTP/1.1 SECRET\r\n\r\n",
		"HTTP/1.1 302 Found\r\nLocation: http://x/%zz?SECRET\r\n\r\n", "HTTP/1.1 200 OK\r\nSECRET\r\n\r\n"} {
		bases = append(bases, newLocalServer(t, raw(answer, false)))
	}
	for _, status := range []int{302, 307} { // without the body, and with it
		bases = append(bases, newLocalServer(t, http.RedirectHandler(elsewhere+"/steal?SECRET", status)))
	}
	for _, base := range append(bases, "http://127.0.0.1:1", "http://[::1", "gopher://x", "http://127.0.0.1:1/%zz") {
		w := newWorld(t) // which fails if its log has a secret of its own
		w.wechat.client, w.wechat.apiBase = newHTTPClient(), base
		out := w.do("GET", "/wechat/getloginqr", "")
		_, err := w.wechat.call(t.Context(), "/cgi-bin/token", url.Values{"secret": {"SECRET"}}, nil)
		if text := fmt.Sprint(w.logged, err); out.Code != 502 || strings.Contains(text, "SECRET") ||
			!errors.Is(err, errUnreachable) || followed.Load() > 0 {
			t.Errorf("%s: %d, followed %d times, %s", base, out.Code, followed.Load(), text)
		}
	}
}

func TestClientsHearWithin9Seconds(t *testing.T) {
	for _, slow := range []string{"/stable_token", "/create"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(at(slow, func(rw http.ResponseWriter, r *http.Request) {
				time.Sleep(3500 * time.Millisecond)
				io.WriteString(rw, `{"errcode":-1}`)
			}))
			start := time.Now()
			out := w.do("GET", "/wechat/getloginqr", "")
			if took := time.Since(start); out.Code < 500 || took != 9*time.Second {
				t.Errorf("%s: %d after %v", slow, out.Code, took)
			}
			time.Sleep(time.Minute)
		})
	}
}

func TestProfileAdornsALoginThatStandsWithoutIt(t *testing.T) {
	for _, test := range []struct{ scope, profile, nickname, unionID string }{
		{"snsapi_base", "", "", "of the exchange"},
		{"snsapi_userinfo", `{"nickname":"a","unionid":"of the profile"}`, "a", "of the profile"},
		{"snsapi_userinfo", `{"nickname":"a"}`, "a", "of the exchange"},
		{"snsapi_userinfo", `{"errcode":48001,"errmsg":"api unauthorized","nickname":"nobody"}`, "", "of the exchange"},
	} {
		w := newWorld(t, "WECHAT_SCOPE="+test.scope)
		w.setFault(saying("/userinfo", test.profile,
			"/oauth2/access_token", `{"access_token":"t","openid":"alice","unionid":"of the exchange"}`))
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		want := login{OpenID: "alice", Nickname: test.nickname, UnionID: test.unionID}
		if got := w.check(t, qr.Ticket, "").login; got != want {
			t.Errorf("%+v: %+v", test, got)
		}
		if asked := w.called("/sns/userinfo"); (asked == 1) != (test.scope == "snsapi_userinfo") {
			t.Errorf("%s: the profile is asked for %d times", test.scope, asked)
		}
	}
}

func TestLongErrmsgIsCutInTheLog(t *testing.T) {
	w := newWorld(t)
	w.setFault(refusing("", 40013, strings.Repeat("x", 100_000)))
	w.do("GET", "/wechat/getloginqr", "")
	if got := len(w.logged.String()); got > 2000 {
		t.Errorf("%d bytes of log", got)
	}
}
