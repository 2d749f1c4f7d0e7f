package main

import (
	"fmt"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiterHoldsInEveryMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(5)
		var passed []time.Time
		for range 1000 {
			wait := l.pass(one("a"))
			if wait == 0 {
				passed = append(passed, time.Now())
			} else {
				time.Sleep(wait - time.Nanosecond)
				if l.pass(one("a")) == 0 {
					t.Fatal("passes before the wait is over")
				}
				time.Sleep(time.Nanosecond)
			}
			time.Sleep(time.Duration(len(passed)%7) * time.Second)
		}
		for i := 5; i < len(passed); i++ {
			if gap := passed[i].Sub(passed[i-5]); gap < time.Minute {
				t.Fatalf("6 passes within %v", gap)
			}
		}
		if l.pass(one("b")) != 0 {
			t.Error("one key's passes count for another")
		}
	})
	for range 100 {
		if newLimiter(0).pass(one("a")) != 0 {
			t.Fatal("a rate of 0 limits")
		}
	}
}

func TestTheClientIsWhomTheTrustedProxiesName(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, test := range []struct {
		peer, forwarded string
		want            string
	}{
		{"203.0.113.7:1", "198.51.100.1", "203.0.113.7"}, // anybody can send the header
		{"[::ffff:203.0.113.7]:1", "", "203.0.113.7"},
		{"[fe80::1%eth0]:1", "", "fe80::1"},
		{"127.0.0.1:1", "", "127.0.0.1"},
		{"@", "198.51.100.1", "198.51.100.1"}, // of a Unix socket
		{"[::1]:1", "1.1.1.1, 198.51.100.1", "198.51.100.1"},
		{"127.0.0.1:1", "1.1.1.1,198.51.100.1,10.1.2.3", "198.51.100.1"}, // through two proxies
		{"127.0.0.1:1", "1.1.1.1, ,198.51.100.1, ,", "198.51.100.1"},
		{"127.0.0.1:1", ",", "127.0.0.1"},
		{"127.0.0.1:1", "nonsense", "invalid IP"},
		{"127.0.0.1:1", "198.51.100.1:555", "198.51.100.1"},
		{"[::1]:1", "[2001:db8::1]:555", "2001:db8::1"},
		{"10.1.2.3:1", "198.51.100.1", "198.51.100.1"},
		{"10.1.2.3:1", "", "10.1.2.3"},
		{"[fd00::5]:1", "198.51.100.1", "198.51.100.1"},
		{"11.1.2.3:1", "198.51.100.1", "11.1.2.3"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		r.Header.Set("X-Forwarded-For", test.forwarded)
		equal(t, fmt.Sprintf("%s for %q", test.peer, test.forwarded), client(r, trusted).String(), test.want)
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr, r.Header["X-Forwarded-For"] = "127.0.0.1:1", []string{"198.51.100.1", "198.51.100.2"}
	equal(t, "two headers", client(r, nil).String(), "198.51.100.2")
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
			{"the same by a Unix socket", "@", "", 0},
			{"an IPv6 address", "[2001:db8:1:1::1]:1", "", 3},
			{"its neighbour in the /64", "[2001:db8:1:1:ffff::1]:1", "", 0},
		} {
			equal(t, test.name, w.countQRCodes(t, test.peer, test.forwarded), test.want)
		}
		all := 3
		for i := range 0x100 { // the other /64 of the same /48
			all += w.countQRCodes(t, fmt.Sprintf("[2001:db8:1:%x::1]:1", 2+i), "")
		}
		if all != 30 {
			t.Errorf("a /48: %d QR codes, want 30", all)
		}
		equal(t, "another /48", w.countQRCodes(t, "[2001:db8:2::1]:1", ""), 3)
		time.Sleep(time.Minute)
		equal(t, "a minute later", w.countQRCodes(t, "[2001:db8:1:5::1]:1", ""), 3)
	})
}

func TestLimitersMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		long := newLimiter(1000)
		for range 100 {
			long.pass(one("a"))
			time.Sleep(6 * time.Second)
		}
		if n := len(long.passed["a"]); n > 10 {
			t.Errorf("%d passes are kept, of 10 a minute", n)
		}
		l, g := newLimiter(60), newPushGuard(time.Minute)
		for i := range maxPushes + 1000 {
			l.pass(one(strconv.Itoa(i)))
			g.admit(t.Context(), strconv.Itoa(i), nil)
		}
		if len(l.passed) > maxKeys || len(g.seen) > maxPushes {
			t.Errorf("%d clients and %d pushes are kept", len(l.passed), len(g.seen))
		}
		for i := 0; len(l.passed) < maxKeys; i++ {
			l.pass(one("more" + strconv.Itoa(i)))
		}
		if l.pass(one("more0")); len(l.passed) != maxKeys {
			t.Errorf("somebody is forgotten for one who is known: %d are kept", len(l.passed))
		}
		time.Sleep(time.Minute)
		if l.pass(one("later")); len(l.passed) != 1 {
			t.Errorf("%d are kept after their minute", len(l.passed))
		}
	})
}
