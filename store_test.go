package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// must fails the test if err is set.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *store) stateOf(secret string) *state {
	st, _ := s.look(s.find(digest(secret)))
	return st
}

func (s *store) status(secret string) status { return s.stateOf(secret).status }

func TestDigest(t *testing.T) {
	// printf secret | sha256sum | cut -c 1-32
	const want = "2bb80d537b1da3e38bd30361aa855686"
	if got := digest("secret").String(); got != want || parseKey(got) != digest("secret") {
		t.Errorf("digest = %q, want %q", got, want)
	}
	for _, text := range []string{"", want[:30], want[:31], want + "0", want + "00", want[:30] + "zz"} {
		if got := parseKey(text); got != (key{}) {
			t.Errorf("%q is taken for the key %v", text, got)
		}
	}
}

func TestTicketExpiresToTheNanosecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(5*time.Minute, 10)
		must(t, s.begin("t", "x", nil))
		time.Sleep(5*time.Minute - 1)
		if got := s.status("t"); got != statusPending {
			t.Errorf("1 ns before its end the ticket is %q", got)
		}
		time.Sleep(time.Nanosecond)
		if got := s.status("t"); got != statusExpired {
			t.Errorf("at its end the ticket is %q", got)
		}
		if s.complete(digest("t"), flowScan, login{OpenID: "late"}) {
			t.Error("an expired ticket logs in")
		}
		synctest.Wait()
		if _, held := s.tickets.Load(digest("t")); held || s.live != 0 {
			t.Errorf("the expired ticket is kept; %d live", s.live)
		}
	})
}

func TestResultStaysReadableThenGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(time.Minute, 10)
		must(t, s.begin("t", "x", nil))
		time.Sleep(59 * time.Second)
		if !s.complete(digest("t"), flowScan, login{OpenID: "alice"}) {
			t.Fatal("a live ticket does not log in")
		}
		time.Sleep(resultTTL - 1) // beyond the end of the wait
		for range 2 {
			if st := s.stateOf("t"); st.status != statusDone || st.login.OpenID != "alice" {
				t.Errorf("the result is %+v", st)
			}
		}
		time.Sleep(time.Nanosecond)
		if got := s.status("t"); got != statusExpired {
			t.Errorf("after its time the result is %q", got)
		}
		if s.complete(digest("t"), flowScan, login{OpenID: "mallory"}) {
			t.Error("a replay revives the ticket")
		}
		synctest.Wait()
		if _, held := s.tickets.Load(digest("t")); held || s.live != 0 || len(s.line) != 0 {
			t.Errorf("kept: %v, %d live, %d blocks in line", held, s.live, len(s.line))
		}
	})
}

func TestSweepForgetsEachTicketAtItsOwnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(10*time.Second, 100)
		for i := range 10 { // tickets 0, 3, 6, 9 are done 5 s after they begin
			must(t, s.begin(strconv.Itoa(i), "x", nil))
			if i%3 == 0 {
				time.AfterFunc(5*time.Second, func() { s.complete(digest(strconv.Itoa(i)), flowScan, login{OpenID: "o"}) })
			}
			time.Sleep(time.Second)
		}
		for second := 10; second < 90; second++ {
			synctest.Wait()
			live := 0
			for i := range 10 {
				if end := i + 10; i%3 == 0 && second < i+5+60 || i%3 != 0 && second < end {
					live++
				}
			}
			held := 0
			s.tickets.Range(func(any, any) bool { held++; return true })
			if s.count() != live || held != live {
				t.Fatalf("after %d s: %d counted and %d held, want %d", second, s.count(), held, live)
			}
			time.Sleep(time.Second)
		}
	})
}

func TestFirstScanWinsForGood(t *testing.T) {
	s := newStore(time.Minute, 10)
	must(t, s.begin("t", "x", nil))
	var wins atomic.Int32
	var winner atomic.Value
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			if openID := strconv.Itoa(i); s.complete(digest("t"), flowScan, login{OpenID: openID}) {
				wins.Add(1)
				winner.Store(openID)
			}
		})
	}
	wg.Wait()
	st := s.stateOf("t")
	if wins.Load() != 1 || st.login.OpenID != winner.Load() {
		t.Errorf("%d wins; %v won, %q is logged in", wins.Load(), winner.Load(), st.login.OpenID)
	}
}

func TestTicketBelongsToItsFlow(t *testing.T) {
	s := newStore(time.Minute, 10)
	must(t, s.begin("a", "x", nil))
	must(t, s.begin("b", "", nil))
	if s.complete(digest("a"), flowAuth, login{OpenID: "o"}) || s.complete(digest("b"), flowScan, login{OpenID: "o"}) {
		t.Error("a ticket is completed through the other flow")
	}
	if s.complete(digest("never issued"), flowScan, login{OpenID: "o"}) || s.complete(key{}, flowScan, login{OpenID: "o"}) {
		t.Error("a ticket that was never issued is completed")
	}
}

func TestTicketIsIssuedOnce(t *testing.T) {
	s := newStore(time.Minute, 10)
	must(t, s.begin("t", "x", nil))
	if s.begin("t", "x", nil) == nil {
		t.Error("one ticket is given to two browsers")
	}
}

func TestCapFreesExactlyAtExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(time.Minute, 2)
		must(t, s.begin("1", "x", nil))
		time.Sleep(time.Second)
		must(t, s.begin("2", "x", nil))
		if err := s.begin("3", "x", nil); !errors.Is(err, errTooManyTickets) || s.count() != 2 {
			t.Errorf("over the cap: %v", err)
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		must(t, s.begin("3", "x", nil))
		if err := s.begin("4", "x", nil); !errors.Is(err, errTooManyTickets) {
			t.Errorf("over the cap again: %v", err)
		}
	})
}

func TestAllWaitersWakeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(time.Minute, 10)
		must(t, s.begin("t", "x", nil))
		start := time.Now()
		var told atomic.Int32
		for range 100 {
			go func() {
				s.wait(t.Context(), s.find(digest("t")), "", 25*time.Second)
				if st := s.stateOf("t"); st.login.OpenID == "alice" && time.Since(start) == 3*time.Second {
					told.Add(1)
				}
			}()
		}
		time.Sleep(3 * time.Second)
		s.complete(digest("t"), flowScan, login{OpenID: "alice"})
		synctest.Wait()
		if told.Load() != 100 {
			t.Errorf("%d of 100 waiters learned of the login at once", told.Load())
		}
	})
}

func TestWaitEnds(t *testing.T) {
	for _, test := range []struct {
		name      string
		ttl, wait time.Duration
		cancel    time.Duration
		took      time.Duration
		want      status
	}{
		{"when its time is over", time.Minute, 25 * time.Second, time.Hour, 25 * time.Second, statusPending},
		{"when the ticket expires", 10 * time.Second, 25 * time.Second, time.Hour, 10 * time.Second, statusExpired},
		{"when the context ends", time.Minute, 25 * time.Second, time.Second, time.Second, statusPending},
		{"at once without a wait", time.Minute, 0, time.Hour, 0, statusPending},
		{"at once with a negative wait", time.Minute, -1, time.Hour, 0, statusPending},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStore(test.ttl, 10)
				must(t, s.begin("t", "x", nil))
				ctx, cancel := context.WithTimeout(t.Context(), test.cancel)
				defer cancel()
				start := time.Now()
				s.wait(ctx, s.find(digest("t")), "", test.wait)
				got := s.status("t")
				if took := time.Since(start); got != test.want || took != test.took {
					t.Errorf("%q after %v, want %q after %v", got, took, test.want, test.took)
				}
			})
		})
	}
}

func TestRedeem(t *testing.T) {
	failure := errors.New("WeChat is down")
	s := newStore(time.Minute, 10)
	must(t, s.begin("t", "", nil))
	ticket := s.find(digest("t"))
	var exchanges atomic.Int32
	try := func(code string, err error) error {
		return s.redeem(ticket, code, func() (login, error) {
			exchanges.Add(1)
			return login{OpenID: "of " + code}, err
		})
	}
	if err := try("bad", failure); err != failure {
		t.Errorf("a failed exchange: %v", err)
	}
	if err := try("bad", nil); err != failure || exchanges.Load() != 1 {
		t.Errorf("the same code again: %v, %d exchanges", err, exchanges.Load())
	}
	var wg sync.WaitGroup
	for range 5 { // opened twice, and more
		wg.Go(func() {
			if err := try("good", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if exchanges.Load() != 2 {
		t.Errorf("%d exchanges, want 2", exchanges.Load())
	}
	if err := try("other", nil); err != errCodeUsed || exchanges.Load() != 2 {
		t.Errorf("another person's code: %v, %d exchanges", err, exchanges.Load())
	}
	if st := s.stateOf("t"); st.login.OpenID != "of good" {
		t.Errorf("logged in: %+v", st)
	}
}

func TestRedeemTriesFewCodes(t *testing.T) {
	s := newStore(time.Minute, 10)
	must(t, s.begin("t", "", nil))
	ticket := s.find(digest("t"))
	exchanges := 0
	for i := range 100 {
		s.redeem(ticket, strconv.Itoa(i), func() (login, error) {
			exchanges++
			return login{}, errors.New("no such code")
		})
	}
	if exchanges != maxCodes || len(ticket.outcomes) != maxCodes {
		t.Errorf("%d made-up codes were exchanged and %d kept, want %d", exchanges, len(ticket.outcomes), maxCodes)
	}
}

func TestResultGoesBeforeTheWaitWouldHaveEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(5*time.Minute, 1)
		must(t, s.begin("t", "x", nil))
		s.complete(digest("t"), flowScan, login{OpenID: "alice"})
		time.Sleep(resultTTL)
		synctest.Wait()
		if s.count() != 0 {
			t.Error("a result that nobody can read any more takes up room")
		}
	})
}

func TestRedeemOfOneCodeDoesNotWaitForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(time.Minute, 10)
		must(t, s.begin("t", "", nil))
		ticket := s.find(digest("t"))
		var exchanges atomic.Int32
		slow := func() (login, error) {
			exchanges.Add(1)
			time.Sleep(9 * time.Second)
			return login{OpenID: "alice"}, errors.New("WeChat is slow")
		}
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() { s.redeem(ticket, strconv.Itoa(i), slow) })
		}
		wg.Wait()
		if took := time.Since(start); took != 9*time.Second || exchanges.Load() != 3 {
			t.Errorf("%d exchanges took %v, want 3 in 9s", exchanges.Load(), took)
		}
	})
}

func TestRedeemOfATicketThatExpiresMeanwhileIsNoLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(time.Minute, 10)
		must(t, s.begin("t", "", nil))
		ticket := s.find(digest("t"))
		err := s.redeem(ticket, "code", func() (login, error) {
			time.Sleep(time.Minute)
			return login{OpenID: "alice"}, nil
		})
		if !errors.Is(err, errCodeUsed) {
			t.Errorf("the phone is told %v, and the browser nothing", err)
		}
	})
}

func TestFirstScanWinsARace(t *testing.T) {
	s := newStore(time.Minute, 10_000)
	for i := range 5000 {
		secret := strings.Repeat("t", i)
		must(t, s.begin(secret, "x", nil))
		var wins atomic.Int32
		var wg sync.WaitGroup
		start := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				<-start // so that all are at it at once
				if s.complete(digest(secret), flowScan, login{OpenID: "o"}) {
					wins.Add(1)
				}
			})
		}
		close(start)
		wg.Wait()
		if wins.Load() != 1 {
			t.Fatalf("ticket %d is won %d times", i, wins.Load())
		}
	}
}

func TestEachOfManyTicketsEndsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 3*blockSize + 1
		s := newStore(time.Minute, many)
		steps := make(map[string]int)
		s.step = func(_ *ticket, step string) { steps[step]++ }
		for generation := 1; generation <= 2; generation++ { // the second begins in an empty line
			for i := range many {
				must(t, s.begin(strconv.Itoa(i), "x", nil))
			}
			for i := range blockSize {
				s.complete(digest(strconv.Itoa(3*i)), flowScan, login{OpenID: "o"})
			}
			time.Sleep(max(time.Minute, resultTTL))
			synctest.Wait()
			if begun, expired := steps["begun"], steps["expired"]; begun != generation*many || expired != generation*(many-blockSize) || s.count() != 0 || len(s.line) != 0 {
				t.Errorf("%d begun, %d expired, %d live, %d blocks in line", begun, expired, s.count(), len(s.line))
			}
		}
	})
}
