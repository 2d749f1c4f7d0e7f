package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
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
		var tokens sync.Map
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				token, err := w.wechat.accessToken(t.Context())
				if err != nil {
					t.Error(err)
				}
				tokens.Store(token, true)
			})
		}
		wg.Wait()
		different := 0
		tokens.Range(func(any, any) bool { different++; return true })
		if calls := w.called("/cgi-bin/stable_token"); calls != 1 || different != 1 {
			t.Errorf("%d fetches, %d tokens", calls, different)
		}
	})
}

func TestTokenIsRenewedEarlyAndNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first, err := w.wechat.accessToken(t.Context())
		must(t, err)
		time.Sleep(2*time.Hour - 300*time.Second - 2*time.Second)
		if token, _ := w.wechat.accessToken(t.Context()); token != first || w.called("/cgi-bin/stable_token") != 1 {
			t.Error("renewed too early")
		}
		w.setFault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(3 * time.Second); return false })
		time.Sleep(2 * time.Second)
		start := time.Now()
		if token, _ := w.wechat.accessToken(t.Context()); token != first || time.Since(start) != 0 {
			t.Errorf("the old token is good, yet a caller waits %v", time.Since(start))
		}
		time.Sleep(4 * time.Second)
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

// refuseTokens makes the simulator refuse tokens with code while bad says so.
func (w *world) refuseTokens(code int, bad func(token string) bool) {
	w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/qrcode/create") || !bad(r.URL.Query().Get("access_token")) {
			return false
		}
		fmt.Fprintf(rw, `{"errcode":%d,"errmsg":"access_token is invalid"}`, code)
		return true
	})
}

func TestRefusedTokenIsRenewedOnce(t *testing.T) {
	for _, code := range []int{40001, 40014, 42001} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			refused, err := w.wechat.accessToken(t.Context())
			must(t, err)
			// A stable token that is refused has been replaced on WeChat's side.
			w.refuseTokens(code, func(token string) bool { return token == refused })
			fresh := func(rw http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, "/stable_token") {
					http.NotFound(rw, r) // so that a plain, new one is fetched
					return true
				}
				return false
			}
			refuse := w.fault
			w.setFault(func(rw http.ResponseWriter, r *http.Request) bool { return fresh(rw, r) || refuse(rw, r) })
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
		w := newWorld(t)
		w.refuseTokens(40001, func(string) bool { return true })
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
		if out := w.do("GET", "/wechat/getloginqr", ""); out.Code != 502 {
			t.Errorf("busy three times: %d", out.Code)
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
	c := wechat{config: config{appID: "wx1", openBase: "https://open.weixin.qq.com", scope: "snsapi_base"}}
	const want = "https://open.weixin.qq.com/connect/oauth2/authorize?appid=wx1&redirect_uri=https%3A%2F%2Flogin.example.com%2Fwechat%2Faccessusercode&response_type=code&scope=snsapi_base&state=abc#wechat_redirect"
	if got := c.authorizeURL("https://login.example.com/wechat/accessusercode", "abc"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestQRImageURLEscapesTheTicket(t *testing.T) {
	c := wechat{config: config{mpBase: "https://mp.weixin.qq.com"}}
	const want = "https://mp.weixin.qq.com/cgi-bin/showqrcode?ticket=gQ%2Fa%2Bb%3D%3D"
	if got := c.qrImageURL("gQ/a+b=="); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestLoginStandsWithoutItsProfile(t *testing.T) {
	w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo")
	w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/userinfo") {
			return false
		}
		io.WriteString(rw, `{"errcode":48001,"errmsg":"api unauthorized"}`)
		return true
	})
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, "alice", "")
	if got := w.check(t, qr.Ticket, ""); got.OpenID != "alice" || got.Nickname != "" {
		t.Errorf("%+v", got)
	}
}

func TestEveryKnownErrcodeHasAHint(t *testing.T) {
	for _, code := range []int{-1, 40013, 40002, 41002, 40125, 40001, 40243, 41004, 40014, 42001, 40164, 61004, 89503, 45009, 45011, 48001, 50002, 40029, 40163, 42003} {
		if hint(&apiError{path: "/cgi-bin/qrcode/create", code: code}) == "" {
			t.Errorf("errcode %d has no hint", code)
		}
	}
	for path, want := range map[string]string{"/cgi-bin/stable_token": hintSecret, "/cgi-bin/token": hintSecret, "/cgi-bin/qrcode/create": hintToken} {
		if got := hint(&apiError{path: path, code: 40001}); got != want {
			t.Errorf("40001 from %s: %q, want %q", path, got, want)
		}
	}
}

func TestErrorsHoldNoURL(t *testing.T) {
	for _, base := range []string{"http://127.0.0.1:1", "http://[::1", "gopher://x", "http://127.0.0.1:1/%zz"} {
		c := wechat{config: config{appID: "wx1", appSecret: "s3cr3t", apiBase: base}, client: newHTTPClient()}
		_, err := c.call(t.Context(), "/cgi-bin/token", url.Values{"secret": {"s3cr3t"}}, nil)
		if err == nil || strings.Contains(err.Error(), "s3cr3t") || !errors.Is(err, errUnreachable) {
			t.Errorf("%s: %v", base, err)
		}
	}
}

// FuzzDecodeXML: no push crashes us, and what is accepted has the root xml.
func FuzzDecodeXML(f *testing.F) {
	for _, seed := range []string{pushXML("o", "SCAN", "k", "t"), "<xml/>", "<xml></xml>x", "<!DOCTYPE a [<!ENTITY b \"c\">]><xml>&b;</xml>",
		"<?xml version=\"1.0\" encoding=\"GBK\"?><xml/>", "<xml><Event>a</Event><Event>b</Event></xml>", strings.Repeat("<a>", 20000), "\xff\xfe"} {
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
		if reply, err := textReply(&push, time.Unix(0, 0), "hello"); err != nil || !slices.Equal(reply[:5], []byte("<xml>")) {
			t.Errorf("reply %q, %v", reply, err)
		}
	})
}
