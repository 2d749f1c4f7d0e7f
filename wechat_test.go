package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestOneTokenFetchForAllCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(time.Second); return false })
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if token, err := w.wechat.accessToken(t.Context()); err != nil || len(token) < 100 {
					t.Errorf("%q, %v", token, err)
				}
			})
		}
		wg.Wait()
		if calls := w.called("/cgi-bin/stable_token"); calls != 1 {
			t.Errorf("%d fetches", calls)
		}
	})
}

func TestOnlyWhoRenewsTheTokenWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first, err := w.wechat.accessToken(t.Context())
		must(t, err)
		time.Sleep(2*time.Hour - 300*time.Second)
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(3 * time.Second); return false })
		start := time.Now()
		var renewed atomic.Value
		go func() {
			token, _ := w.wechat.accessToken(t.Context())
			renewed.Store(token)
		}()
		synctest.Wait()
		if token, _ := w.wechat.accessToken(t.Context()); token != first || time.Since(start) != 0 {
			t.Errorf("the old token is good, yet who does not renew it waits %v", time.Since(start))
		}
		time.Sleep(4 * time.Second)
		if synctest.Wait(); renewed.Load() == first {
			t.Error("whoever renews the token gets the old one")
		}
		if w.called("/cgi-bin/stable_token") != 2 {
			t.Errorf("%d fetches, want 2", w.called("/cgi-bin/stable_token"))
		}
	})
}

func TestTokenLives(t *testing.T) {
	for _, test := range []struct {
		expiresIn string
		good      time.Duration // how long it serves without another fetch
	}{
		{"7200", 6900 * time.Second}, {"600", 400 * time.Second}, {"300", 200 * time.Second},
		{"2", 40 * time.Second}, {"0", 40 * time.Second}, {"-5", 40 * time.Second}, {"1e300", 6900 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
				if asked, _ := io.ReadAll(r.Body); !strings.Contains(string(asked), `"force_refresh":false`) {
					t.Errorf("a token is forced: %s", asked)
				}
				fmt.Fprintf(rw, `{"access_token":"t","expires_in":%s}`, test.expiresIn)
				return true
			})
			w.wechat.accessToken(t.Context())
			time.Sleep(test.good - 1)
			w.wechat.accessToken(t.Context())
			synctest.Wait()
			before := w.called("/cgi-bin/stable_token")
			time.Sleep(time.Nanosecond)
			w.wechat.accessToken(t.Context())
			synctest.Wait()
			if after := w.called("/cgi-bin/stable_token"); before != 1 || after != 2 {
				t.Errorf("expires_in %s: %d fetches before %v, %d after; want 1 and 2", test.expiresIn, before, test.good, after)
			}
		})
	}
}

func TestFailedFetchIsSharedForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.setFault(func(rw http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }) // hangs
		start := time.Now()
		var timedOut atomic.Int32
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := w.wechat.accessToken(t.Context()); errors.Is(err, errTimeout) {
					timedOut.Add(1)
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); timedOut.Load() != 50 || took > 10*time.Second {
			t.Errorf("%d of 50 callers timed out, after %v", timedOut.Load(), took)
		}
		calls := w.called("/cgi-bin/stable_token")
		time.Sleep(holdOff - 1)
		if _, err := w.wechat.accessToken(t.Context()); !errors.Is(err, errTimeout) || w.called("/cgi-bin/stable_token") != calls {
			t.Errorf("within a second: %v, %d calls", err, w.called("/cgi-bin/stable_token"))
		}
		w.setFault(nil)
		time.Sleep(time.Nanosecond)
		if _, err := w.wechat.accessToken(t.Context()); err != nil {
			t.Errorf("after recovery: %v", err)
		}
	})
}

func TestStableTokenFallsBackWhereItIsNotOffered(t *testing.T) {
	for answer, fallsBack := range map[string]bool{
		"": true, `{"errcode":48004,"errmsg":"no such api"}`: true,
		`{"errcode":40013}`: false, `{"errcode":40125}`: false, `{"errcode":40001}`: false, `{"errcode":40164}`: false,
		`{"errcode":45009}`: false, `{"errcode":45011}`: false, `{"errcode":-1}`: false, `<html>`: false,
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/stable_token") {
					return false
				}
				if answer == "" {
					http.NotFound(rw, r)
				}
				io.WriteString(rw, answer)
				return true
			})
			_, err := w.wechat.accessToken(t.Context())
			if got := w.called("/cgi-bin/token") == 1; got != fallsBack || (err == nil) != fallsBack {
				t.Errorf("%s: falls back %v, want %v; %v", answer, got, fallsBack, err)
			}
		})
	}
}

func TestRefusedTokenIsRenewedOnce(t *testing.T) {
	for _, code := range []int{40001, 40014, 42001} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			refused, err := w.wechat.accessToken(t.Context())
			must(t, err)
			// A stable token that is refused has been replaced on WeChat's side.
			refuse := refusing("/qrcode/create", code, "access_token is invalid")
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, "/stable_token") {
					http.NotFound(rw, r) // so that a plain, new one is fetched
					return true
				}
				return r.URL.Query().Get("access_token") == refused && refuse(rw, r)
			})
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if _, _, err := w.wechat.createQR(t.Context(), "s", time.Minute); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if got := w.called("/cgi-bin/token"); got != 1 {
				t.Errorf("%d: %d renewals for 20 callers, want 1", code, got)
			}
		})
	}
}

func TestTokensRefusedForEverCauseNoStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "QR_RATE=0")
		w.setFault(refusing("/qrcode/create", 40001, "access_token is invalid"))
		for range 100 { // over 10 seconds
			if out := w.do("GET", "/wechat/getloginqr", ""); out.Code != 502 || !strings.Contains(out.Body.String(), "wechat_refused") {
				t.Errorf("%d %s", out.Code, out.Body)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if got := w.called("/cgi-bin/stable_token"); got > 12 {
			t.Errorf("%d token fetches in 10 s", got)
		}
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
		if _, shown := w.scan(qr.Ticket, "alice", ""); !strings.HasSuffix(shown, "reason=unavailable") || w.called("/sns/oauth2/access_token") != 1 {
			t.Errorf("a code is exchanged %d times; %s", w.called("/sns/oauth2/access_token"), shown)
		}
	})
}

func TestQRCodesAreFreshAndOfTheTicketsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "TICKET_TTL=90s")
		var bodies []string
		w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/create") {
				body, _ := io.ReadAll(r.Body)
				bodies = append(bodies, string(body))
				fmt.Fprintf(rw, `{"ticket":"t%d","url":"http://weixin.qq.com/q/1"}`, len(bodies))
				return true
			}
			return false
		})
		w.begin(t, "getloginqr")
		w.begin(t, "getloginqr")
		if len(bodies) != 2 || bodies[0] == bodies[1] || !strings.Contains(bodies[0], `"expire_seconds":90`) || !strings.Contains(bodies[0], `"action_name":"QR_STR_SCENE"`) {
			t.Errorf("%q", bodies)
		}
	})
}

func TestAuthorizeURL(t *testing.T) {
	c := wechat{appID: "wx1", openBase: "https://open.weixin.qq.com", scope: "snsapi_base"}
	const want = "https://open.weixin.qq.com/connect/oauth2/authorize?appid=wx1&redirect_uri=https%3A%2F%2Flogin.example.com%2Fwechat%2Faccessusercode&response_type=code&scope=snsapi_base&state=abc#wechat_redirect"
	if got := c.authorizeURL("https://login.example.com/wechat/accessusercode", "abc"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestEveryKnownErrcodeHasAHint(t *testing.T) {
	for _, code := range []int{-1, 40013, 40002, 41002, 40125, 40001, 40243, 41004, 40014, 42001, 40164, 61004, 89503, 45009, 45011, 48001, 50002, 40029, 40163, 42003} {
		if k, english, chinese := sorted(&apiError{path: "/cgi-bin/qrcode/create", code: code}); k == kindOther || english == "" || chinese == "" {
			t.Errorf("errcode %d: %q, %q, %q", code, k, english, chinese)
		}
	}
	for path, want := range map[string]kind{"/cgi-bin/stable_token": kindSecret, "/cgi-bin/token": kindSecret, "/cgi-bin/qrcode/create": kindToken} {
		if got := kindOf(&apiError{path: path, code: 40001}); got != want {
			t.Errorf("40001 from %s: %q, want %q", path, got, want)
		}
	}
}

func TestErrorsHoldNoURL(t *testing.T) {
	for _, base := range []string{"http://127.0.0.1:1", "http://[::1", "gopher://x", "http://127.0.0.1:1/%zz"} {
		c := newWeChat(&config{appID: "wx1", appSecret: "s3cr3t", apiBase: base}, slog.New(slog.DiscardHandler))
		_, err := c.call(t.Context(), "/cgi-bin/token", url.Values{"secret": {"s3cr3t"}}, nil)
		if err == nil || strings.Contains(err.Error(), "s3cr3t") || !errors.Is(err, errUnreachable) {
			t.Errorf("%s: %v", base, err)
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

// TestWeChatsFaults has each fault of WeChat's answered within 10 seconds, by
// what a client can understand, and forgotten after recovery.
func TestWeChatsFaults(t *testing.T) {
	const unreachable, refused, timeout = "502 wechat_unreachable", "502 wechat_refused", "504 wechat_timeout"
	for _, test := range []struct {
		name    string
		fault   http.HandlerFunc
		want    string
		calls   int  // at most, of the path at fault, for three requests in a row
		sockets bool // the fault needs real ones
	}{
		{"hangs", hang, timeout, 3, false},
		{"resets", raw("", true), unreachable, 6, true}, // the transport tries a GET twice
		{"truncated", raw("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"access_token\":\"t\"", false), unreachable, 3, true},
		{"not HTTP", raw("SSH-2.0-OpenSSH_9.2\r\n", false), unreachable, 3, true},
		{"HTML", page(200, "", "<html>busy</html>"), unreachable, 3, false},
		{"empty", page(200, "", ""), unreachable, 3, false},
		{"null", page(200, "", "null"), unreachable, 3, false},
		{"nothing in it", page(200, "", "{}"), unreachable, 3, false},
		{"wrong types", page(200, "", `{"access_token":7,"ticket":{},"openid":[],"expires_in":"x"}`), unreachable, 3, false},
		{"errcode of a wrong type", page(200, "", `{"errcode":"40001"}`), unreachable, 3, false},
		{"8 MiB", page(200, "", strings.Repeat(" ", 8<<20)), unreachable, 3, true},
		{"503 with JSON", page(503, "", `{"access_token":"t","ticket":"t","url":"u","openid":"mallory"}`), unreachable, 3, false},
		{"busy", page(200, "", `{"errcode":-1,"errmsg":"system error"}`), refused, 9, false},
		{"wrong appid", page(200, "", `{"errcode":40013,"errmsg":"invalid appid"}`), refused, 3, false},
		{"wrong secret", page(200, "", `{"errcode":40125,"errmsg":"invalid appsecret"}`), refused, 3, false},
		{"IP not allowed", page(200, "", `{"errcode":40164,"errmsg":"invalid ip 203.0.113.7"}`), refused, 3, false},
		{"quota", page(200, "", `{"errcode":45009,"errmsg":"reach max api daily quota limit"}`), refused, 3, false},
	} {
		for _, path := range []string{"/cgi-bin/stable_token", "/cgi-bin/qrcode/create", "/sns/oauth2/access_token"} {
			t.Run(test.name+path, func(t *testing.T) {
				if test.sockets {
					t.Parallel()
					w := newWorld(t)
					w.wechat.client, w.wechat.apiBase = newHTTPClient(), newLocalServer(t, w.handler)+"/demo"
					w.bearFault(t, path, test.fault, test.want, test.calls)
					return
				}
				synctest.Test(t, func(t *testing.T) { newWorld(t).bearFault(t, path, test.fault, test.want, test.calls) })
			})
		}
	}
}

// bearFault makes three requests that run into a fault of a call of WeChat's,
// then one that does not. None may take 10 seconds; a push and a parked poll
// must not notice.
func (w *world) bearFault(t *testing.T, path string, fault http.HandlerFunc, want string, calls int) {
	auth := w.begin(t, "getauthqr")
	parked := make(chan pollAnswer, 1)
	go func() { parked <- w.check(t, auth.Ticket, "30") }()
	w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, path) {
			return false
		}
		fault(rw, r)
		return true
	})
	for i := range 3 {
		start := time.Now()
		if strings.HasPrefix(path, "/sns/") {
			out := w.do("GET", "/wechat/accessusercode?code="+strconv.Itoa(i)+"&state="+digest(auth.Ticket).String(), "")
			if !strings.HasSuffix(out.Header().Get("Location"), "reason=unavailable") {
				t.Errorf("callback: %s", out.Header().Get("Location"))
			}
		} else if out := w.do("GET", "/wechat/getloginqr", ""); !strings.HasPrefix(want, strconv.Itoa(out.Code)) || !strings.Contains(out.Body.String(), want[4:]) {
			t.Errorf("%d %s, want %s", out.Code, out.Body, want)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("took %v", took)
		}
		if out := w.push(pushXML("o", "SCAN", "s", "x")); out.Body.String() != "success" {
			t.Errorf("a push notices: %s", out.Body)
		}
	}
	if got := w.called(path); got > calls {
		t.Errorf("%d calls, want at most %d", got, calls)
	}
	w.setFault(nil)
	time.Sleep(holdOff)
	w.begin(t, "getloginqr")
	w.scan(auth.Ticket, "alice", "")
	if answer := <-parked; answer.OpenID != "alice" {
		t.Errorf("a parked poll notices: %+v", answer)
	}
}

func TestAnswersThatAreNoHTTPAreNotQuoted(t *testing.T) {
	for _, answer := range []string{`{"access_token":"SECRET"}`, "HTTP/1.1 302 Found\r\nLocation: http://x/%zz?SECRET\r\n\r\n", "HTTP/1.1 SECRET\r\n\r\n", "HTTP/1.1 200 OK\r\nSECRET\r\n\r\n"} {
		w := newWorld(t)
		w.wechat.client, w.wechat.apiBase = newHTTPClient(), newLocalServer(t, raw(answer, false))
		if out := w.do("GET", "/wechat/getloginqr", ""); out.Code != 502 || strings.Contains(w.logged.String(), "SECRET") {
			t.Errorf("%q: %d, %s", answer, out.Code, w.logged)
		}
	}
}

func TestSecretDoesNotFollowRedirects(t *testing.T) {
	var followed atomic.Int32
	elsewhere := newLocalServer(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	for _, status := range []int{301, 302, 303, 307, 308} {
		w := newWorld(t)
		w.wechat.client = newHTTPClient()
		w.wechat.apiBase = newLocalServer(t, http.RedirectHandler(elsewhere+"/steal", status))
		if out := w.do("GET", "/wechat/getloginqr", ""); out.Code != 502 || followed.Load() != 0 {
			t.Errorf("%d: answer %d, followed %d times", status, out.Code, followed.Load())
		}
	}
}

func TestClientsHearWithin9Seconds(t *testing.T) {
	for _, slow := range []string{"/stable_token", "/create"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, slow) {
					return false
				}
				time.Sleep(3500 * time.Millisecond)
				io.WriteString(rw, `{"errcode":-1}`)
				return true
			})
			start := time.Now()
			out := w.do("GET", "/wechat/getloginqr", "")
			if took := time.Since(start); out.Code < 500 || took != 9*time.Second {
				t.Errorf("%s: %d after %v", slow, out.Code, took)
			}
			start = time.Now()
			time.Sleep(holdOff / 2)
			if w.do("GET", "/wechat/getloginqr", ""); slow == "/stable_token" && time.Since(start) != holdOff/2 {
				t.Errorf("a fetch outlives its time by %v", time.Since(start))
			}
			time.Sleep(time.Minute)
		})
	}
}

func TestExpiredTokenIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.begin(t, "getloginqr")
		w.setFault(refusing("token", 40164, "invalid ip"))
		time.Sleep(2 * time.Hour)
		if out := w.do("GET", "/wechat/getloginqr", ""); !strings.Contains(out.Body.String(), "40164") || w.called("/cgi-bin/qrcode/create") != 1 {
			t.Errorf("%s, %d calls of create", out.Body, w.called("/cgi-bin/qrcode/create"))
		}
	})
}

func TestProfileAdornsALoginThatStandsWithoutIt(t *testing.T) {
	for _, test := range []struct{ scope, profile, nickname, unionID string }{
		{"snsapi_base", "", "", "of the exchange"},
		{"snsapi_userinfo", `{"nickname":"a","unionid":"of the profile"}`, "a", "of the profile"},
		{"snsapi_userinfo", `{"nickname":"a"}`, "a", "of the exchange"},
		{"snsapi_userinfo", `{"errcode":48001,"errmsg":"api unauthorized","nickname":"nobody"}`, "", "of the exchange"},
	} {
		w := newWorld(t, "WECHAT_SCOPE="+test.scope)
		w.setFault(saying("/oauth2/access_token", `{"access_token":"t","openid":"alice","unionid":"of the exchange"}`, "/userinfo", test.profile))
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		if got := w.check(t, qr.Ticket, ""); got.OpenID != "alice" || got.Nickname != test.nickname || got.UnionID != test.unionID {
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
