package main

import (
	"fmt"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const badSignature = "signature=x&timestamp=1&nonce=2"

// knock sends a push or, with GET, the check of the interface URL from a client.
func (w *world) knock(method, query, peer, forwarded string) *httptest.ResponseRecorder {
	return w.do(method, "/wechat/message?"+query, "<xml></xml>", "peer", peer, "X-Forwarded-For", forwarded)
}

func TestWhoGuessesTheTokenIsShutOut(t *testing.T) {
	const guesser, weChat = "203.0.113.7:1", "198.51.100.9:1"
	for _, settings := range [][]string{nil, {"WECHAT_AES_KEY=" + docKey}} {
		for _, method := range []string{"GET", "POST"} {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, settings...)
				right := func() string {
					if method == "GET" {
						return w.signed()
					}
					query, _, err := w.config.signedPush("alice", "SCAN", "s", "t")
					must(t, err)
					return query.Encode()
				}
				for i := range 30 {
					want := 403
					if i >= maxWrong {
						want = 429
					}
					if out := w.knock(method, badSignature, guesser, ""); out.Code != want {
						t.Fatalf("%s, guess %d: %d, want %d", method, i, out.Code, want)
					}
				}
				wrong, guessed := w.knock(method, badSignature, guesser, ""), w.knock(method, right(), guesser, "")
				if guessed.Code != 429 || guessed.Body.String() != wrong.Body.String() || guessed.Header().Get("Retry-After") != "60" {
					t.Errorf("%s: a right guess is told from a wrong one: %d %s", method, guessed.Code, guessed.Body)
				}
				if other := w.knock("GET", w.signed(), weChat, ""); other.Code != 200 {
					t.Errorf("WeChat meanwhile: %d", other.Code)
				}
				time.Sleep(time.Minute)
				if out := w.knock("GET", w.signed(), guesser, ""); out.Code != 200 {
					t.Errorf("a right signature after a minute: %d", out.Code)
				}
			})
		}
	}
}

func TestARightGuessOfWhoIsShutOutLogsNobodyIn(t *testing.T) {
	w := newWorld(t)
	qr := w.begin(t, "getloginqr")
	for range maxWrong {
		w.knock("POST", badSignature, "203.0.113.7:1", "")
	}
	push := pushXML("mallory", "SCAN", "s", qr.Ticket)
	w.do("POST", "/wechat/message?"+w.signed(), push, "peer", "203.0.113.7:1")
	if got := w.check(t, qr.Ticket, ""); got.Login {
		t.Errorf("logged in: %+v", got)
	}
}

func TestGoodPushesPassWhateverOthersSend(t *testing.T) {
	for name, from := range map[string][2]string{
		"behind a local proxy that names nobody": {"127.0.0.1:1", ""},
		"at one address, proven before":          {"172.17.0.1:1", ""},
		"at an address of its own":               {"127.0.0.1:1", "198.51.100.9"},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			for round := range 100 {
				if out := w.knock("GET", w.signed(), from[0], from[1]); out.Code != 200 {
					t.Fatalf("%s, round %d: %d", name, round, out.Code)
				}
				for i := range 20 {
					stranger := from[1]
					if stranger != "" {
						stranger = fmt.Sprintf("203.0.%d.%d", round, i)
					}
					w.knock("POST", badSignature, from[0], stranger)
				}
				qr := w.begin(t, "getauthqr")
				if out := w.do("POST", "/wechat/message?"+w.signed(), pushXML("alice", "SCAN", "s", qr.Ticket), "peer", from[0], "X-Forwarded-For", from[1]); out.Code != 200 {
					t.Fatalf("%s, round %d: a push: %d", name, round, out.Code)
				}
				time.Sleep(2 * time.Second)
			}
		})
	}
}

func TestWhoCannotBeToldApartIsNotShutOut(t *testing.T) {
	w := newWorld(t)
	for range 2 * maxWrong {
		w.knock("POST", badSignature, "127.0.0.1:1", "")
	}
	if out := w.knock("POST", badSignature, "127.0.0.1:1", ""); out.Code != 429 {
		t.Errorf("a wrong signature: %d", out.Code)
	}
	if out := w.knock("POST", w.signed(), "127.0.0.1:1", ""); out.Code != 200 {
		t.Errorf("WeChat's first push: %d", out.Code)
	}
}

func TestAnIPv6NetworkOfOneGuesserIsOneClient(t *testing.T) {
	w := newWorld(t)
	for i := range maxWrong {
		w.knock("GET", badSignature, fmt.Sprintf("[2001:db8:1:%x::1]:1", i), "")
	}
	if out := w.knock("GET", badSignature, "[2001:db8:1:ffff::1]:1", ""); out.Code != 429 {
		t.Errorf("from another /64 of the /48: %d", out.Code)
	}
	if out := w.knock("GET", badSignature, "[2001:db8:2::1]:1", ""); out.Code != 403 {
		t.Errorf("from another /48: %d", out.Code)
	}
}

func TestGuessesFromManyAddressesLeaveEachButOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range maxAllWrong {
			if out := w.knock("GET", badSignature, fmt.Sprintf("203.0.%d.%d:1", i/200, i%200), ""); out.Code != 403 {
				t.Fatalf("guess %d: %d", i, out.Code)
			}
		}
		for i, want := range []int{403, 429, 429} {
			if out := w.knock("GET", badSignature, "203.0.113.7:1", ""); out.Code != want {
				t.Errorf("guess %d of another: %d, want %d", i, out.Code, want)
			}
		}
		if out := w.knock("GET", w.signed(), "198.51.100.9:1", ""); out.Code != 200 {
			t.Errorf("WeChat, from an address not seen before: %d", out.Code)
		}
	})
}

func TestErrorsInTheLogAreShort(t *testing.T) {
	w := newWorld(t)
	name := strings.Repeat("界\n", 10_000)
	if out := w.push("<xml><" + name); out.Code != 400 {
		t.Errorf("%d %s", out.Code, out.Body)
	}
	w.push("<xml><a></" + strings.Repeat("b", 60_000) + ">")
	for line := range strings.Lines(w.logged.String()) {
		if len(line) > 1500 || !strings.Contains(line, "level=") {
			t.Errorf("a line of %d bytes: %.100s", len(line), line)
		}
	}
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
		w.knock("POST", badSignature, "192.0.2.1:1", "") // send's own address
	}
	query.Set("signature", good)
	if status := send(query); status != 429 || body.Len() != len(push) {
		t.Errorf("of a client that is shut out: %d, and %d bytes of %d are read", status, len(push)-body.Len(), len(push))
	}
	w.guesses = newGuessGuard()
	if status := send(query); status != 200 || !w.check(t, qr.Ticket, "").Login {
		t.Errorf("with the right one: %d", status)
	}
}

func TestFullPushGuardForgetsTheOldest(t *testing.T) {
	g := newPushGuard(10 * time.Minute)
	for i := range maxPushes + 1000 {
		g.admit(strconv.Itoa(i), nil)
	}
	for i := 1000; i < maxPushes+1000; i++ {
		if first, _ := g.admit(strconv.Itoa(i), nil); first {
			t.Fatalf("push %d is forgotten before older ones", i)
		}
	}
	if first, _ := g.admit("0", nil); !first {
		t.Error("the oldest is kept, and more than there may be")
	}
}

func TestPushGuardForgetsWhatIsNoLongerFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newPushGuard(time.Minute)
		for i := range 1000 {
			g.admit(strconv.Itoa(i), nil)
			time.Sleep(time.Second)
		}
		if len(g.seen) > 122 {
			t.Errorf("%d pushes are kept, want those of two minutes", len(g.seen))
		}
	})
}
