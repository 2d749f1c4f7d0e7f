package main

import (
	"fmt"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiterLetsEachKeyPassItsRateInAWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiter{rate: 5, window: time.Minute}
		for range 3 {
			time.Sleep(time.Second)
			for i := range 5 {
				if wait := l.pass(one("a")); wait != 0 {
					t.Fatalf("pass %d waits %v", i, wait)
				}
				time.Sleep(10 * time.Second)
			}
			wait := l.pass(one("a"))
			equal(t, "a pass too many waits", wait, 10*time.Second)
			equal(t, "another key waits", l.pass(one("b")), 0)
			equal(t, "two keys, one of which may not pass, wait", l.pass(one("c"), one("a")), wait)
			equal(t, "may still pass", l.left(one("c"), share{"b", 2}), 5)
			time.Sleep(wait - time.Nanosecond)
			equal(t, "just before the end of the window it waits", l.pass(one("a")), time.Nanosecond)
			time.Sleep(time.Nanosecond)
		}
		for i := range 3 * maxKeys {
			l.pass(one(strconv.Itoa(i)))
		}
		if len(l.passed) > maxKeys {
			t.Errorf("%d keys are kept", len(l.passed))
		}
	})
	l := limiter{window: time.Minute}
	for range 100 {
		equal(t, "with a rate of 0, a pass waits", l.pass(one("a")), 0)
	}
}

func TestTheClientIsWhomTheTrustedProxiesName(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, test := range []struct{ peer, forwarded, want string }{
		{"203.0.113.7:1", "198.51.100.1", "203.0.113.7"}, // anybody can send the header
		{"[::ffff:203.0.113.7]:1", "", "203.0.113.7"},
		{"[fe80::1%eth0]:1", "", "fe80::1"},
		{"127.0.0.1:1", "", "127.0.0.1"},
		{"[::1]:1", "1.1.1.1, 198.51.100.1", "198.51.100.1"},
		{"127.0.0.1:1", "1.1.1.1,198.51.100.1,10.1.2.3", "198.51.100.1"}, // through two proxies
		{"127.0.0.1:1", "1.1.1.1, ,198.51.100.1, ,", "198.51.100.1"},
		{"127.0.0.1:1", ",", "127.0.0.1"},
		{"127.0.0.1:1", "198.51.100.1|198.51.100.2", "198.51.100.2"}, // two headers are one list
		{"127.0.0.1:1", "1.1.1.1,nonsense", "invalid IP"},
		{"127.0.0.1:1", "198.51.100.1:555", "198.51.100.1"},
		{"[::1]:1", "[2001:db8::1]:555", "2001:db8::1"},
		{"10.1.2.3:1", "198.51.100.1", "198.51.100.1"},
		{"10.1.2.3:1", "", "10.1.2.3"},
		{"[fd00::5]:1", "198.51.100.1", "198.51.100.1"},
		{"11.1.2.3:1", "198.51.100.1", "11.1.2.3"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		r.Header["X-Forwarded-For"] = strings.Split(test.forwarded, "|")
		equal(t, fmt.Sprintf("%s for %q", test.peer, test.forwarded), client(r, trusted).String(), test.want)
	}
}

// countQRCodes asks for QR codes until one is refused, and returns how many came.
func (w *world) countQRCodes(t *testing.T, peer, forwarded string) (n int) {
	t.Helper()
	for ; n < 1000; n++ {
		begin := []string{"getauthqr", "getloginqr"}[n%2] // which count together
		out := w.do("GET", "/wechat/"+begin, "", "peer", peer, "X-Forwarded-For", forwarded)
		if out.Code == 429 && out.Header().Get("Retry-After") == "60" {
			return n
		}
		if out.Code != 200 {
			t.Fatalf("%s for %q: %d %s", peer, forwarded, out.Code, out.Body)
		}
	}
	return n
}

func TestQRCodesForOneClientAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "QR_RATE=3")
		for _, test := range []struct {
			name, peer, forwarded string
			want                  int
		}{
			{"an IPv4 address", "203.0.113.7:1", "", 3},
			{"behind a proxy", "127.0.0.1:1", "203.0.113.9", 3},
			{"the same with a comma more", "127.0.0.1:1", "203.0.113.9,", 0},
			{"whom the proxy calls by a name", "127.0.0.1:1", "_hidden", 3},
			{"all behind a proxy that does not say who asks", "127.0.0.1:1", "", 30},
			{"the same by another address of loopback", "[::1]:1", "", 0},
			{"an IPv6 address", "[2001:db8:1:1::1]:1", "", 3},
			{"its neighbour in the /64", "[2001:db8:1:1:ffff::1]:1", "", 0},
		} {
			equal(t, test.name, w.countQRCodes(t, test.peer, test.forwarded), test.want)
		}
		all := 3
		for i := range 0x100 { // the other /64 of the same /48
			all += w.countQRCodes(t, fmt.Sprintf("[2001:db8:1:%x::1]:1", 2+i), "")
		}
		equal(t, "a /48", all, 30)
		equal(t, "another /48", w.countQRCodes(t, "[2001:db8:2::1]:1", ""), 3)
		time.Sleep(time.Minute)
		equal(t, "a minute later", w.countQRCodes(t, "[2001:db8:1:5::1]:1", ""), 3)
	})
}
