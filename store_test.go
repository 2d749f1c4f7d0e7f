package main

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"os"
	"strconv"
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

// emptyStore returns a store with records of its own: of at most max tickets in
// memory or, where WXSCAN_REDIS is set, in that Redis.
func emptyStore(t testing.TB, ttl time.Duration, max int64) *store {
	t.Helper()
	url := os.Getenv("WXSCAN_REDIS")
	if url == "" {
		return newStore(ttl, &localRecords{max: max})
	}
	r := newTestRedis(t, url, nil)
	r.prefix = rand.Text() + ":"
	return newStore(ttl, r)
}

// start begins a ticket of flow A.
func (s *store) start(t testing.TB, ticket string) key {
	t.Helper()
	must(t, s.begin(t.Context(), ticket, flowScan, "http://weixin.qq.com/q/02abc", asker{}))
	return digest(ticket)
}

// startAuth begins a ticket of flow B.
func (s *store) startAuth(t testing.TB, ticket string) key {
	t.Helper()
	must(t, s.begin(t.Context(), ticket, flowAuth, "https://open.weixin.qq.com/x", asker{}))
	return digest(ticket)
}

func (s *store) stands(t testing.TB, k key) record {
	t.Helper()
	r, err := s.look(t.Context(), k)
	must(t, err)
	return r
}

// scans completes a ticket of flow A; it is true for the scan that did.
func (s *store) scans(t testing.TB, k key, openID string) bool {
	t.Helper()
	_, first, err := s.complete(t.Context(), k, flowScan, login{OpenID: openID})
	must(t, err)
	return first
}

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
		s := emptyStore(t, 5*time.Minute, 10)
		k := s.start(t, "t")
		time.Sleep(5*time.Minute - 1)
		if got := s.stands(t, k).Status; got != statusPending {
			t.Errorf("1 ns before its end the ticket is %q", got)
		}
		time.Sleep(time.Nanosecond)
		if got := s.stands(t, k).Status; got != statusExpired || s.scans(t, k, "late") {
			t.Errorf("at its end the ticket is %q, or logs in", got)
		}
	})
}

func TestResultStaysReadableThenGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k := s.start(t, "t")
		time.Sleep(59 * time.Second)
		if !s.scans(t, k, "alice") || s.scans(t, k, "bob") {
			t.Fatal("a live ticket logs in nobody, or two")
		}
		time.Sleep(resultTTL - 1) // beyond the end of the wait
		if r := s.stands(t, k); r.Status != statusDone || r.Login.OpenID != "alice" {
			t.Errorf("the result is %+v", r)
		}
		time.Sleep(time.Nanosecond)
		if got := s.stands(t, k).Status; got != statusExpired || s.scans(t, k, "mallory") {
			t.Errorf("after its time the result is %q, or a replay revives the ticket", got)
		}
	})
}

func TestAScanLeavesTimeToDecide(t *testing.T) {
	for at, left := range map[time.Duration]time.Duration{
		4*time.Minute + 58*time.Second: decisionTTL,
		time.Minute:                    4 * time.Minute,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := emptyStore(t, 5*time.Minute, 10)
			s.confirm = true
			k := s.start(t, "t")
			time.Sleep(at)
			s.scans(t, k, "alice")
			if r := s.stands(t, k); r.left() != left {
				t.Errorf("after a scan at %v there are %v to decide, want %v", at, r.left(), left)
			}
			time.Sleep(left - 1)
			if decided, err := s.decide(t.Context(), k, true); !decided || err != nil {
				t.Errorf("a decision in time: %v, %v", decided, err)
			}
		})
	}
}

// counted returns how many records a store in memory holds, as its count says.
func (s *store) counted(t *testing.T) (held int64) {
	t.Helper()
	m := s.records.(*localRecords)
	for range m.byKey.Range {
		held++
	}
	if counted := m.count.Load(); counted != held {
		t.Errorf("%d held, %d counted", held, counted)
	}
	return held
}

func TestSweepForgetsWhatHasEndedAndTheCapCountsWhatIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := newStore(720*time.Hour, &localRecords{max: 10}) // however long tickets live, results do not stay
		events := make(map[status]int)
		var mu sync.Mutex
		s.event = func(_ key, r record) {
			mu.Lock()
			defer mu.Unlock()
			events[r.Status]++
		}
		go s.records.(*localRecords).sweep(ctx, s.event)
		for i := range 10 {
			if k := s.start(t, strconv.Itoa(i)); i < 4 {
				s.scans(t, k, "o")
			}
		}
		for _, step := range []struct {
			after  time.Duration
			held   int64
			isFull bool
		}{{resultTTL - 1, 10, true}, {sweepEvery, 6, false}, {720 * time.Hour, 0, false}} {
			time.Sleep(step.after)
			synctest.Wait()
			if got := s.counted(t); got != step.held {
				t.Errorf("%d held, want %d", got, step.held)
			}
			if err := s.records.ready(); errors.Is(err, errTooManyTickets) != step.isFull {
				t.Errorf("with %d held: %v", step.held, err)
			}
			if step.isFull && !errors.Is(s.begin(ctx, "one more", flowScan, "x", asker{}), errTooManyTickets) {
				t.Error("there is a ticket over the cap")
			}
		}
		want := map[status]int{statusPending: 10, statusDone: 4, statusExpired: 6}
		if !maps.Equal(events, want) {
			t.Errorf("events %v, want %v", events, want)
		}
	})
}

func TestTicketBelongsToItsFlow(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	scan, auth := s.start(t, "a"), s.startAuth(t, "b")
	if _, first, _ := s.complete(t.Context(), scan, flowAuth, login{OpenID: "o"}); first || s.scans(t, auth, "o") {
		t.Error("a ticket is completed through the other flow")
	}
	if _, first, _ := s.claim(t.Context(), scan, "code"); first {
		t.Error("a ticket of flow A takes an OAuth code")
	}
	if s.scans(t, digest("never issued"), "o") || s.scans(t, key{}, "o") {
		t.Error("a ticket that was never issued is completed")
	}
}

func TestTicketIsIssuedOnce(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	s.start(t, "t")
	if s.begin(t.Context(), "t", flowScan, "x", asker{}) == nil {
		t.Error("one ticket is given to two browsers")
	}
	if _, inMemory := s.records.(*localRecords); inMemory && s.counted(t) != 1 {
		t.Error("it is counted twice")
	}
}

func isNews(r *record) bool { return r.Status != statusPending }

func TestAllWaitersWakeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k := s.start(t, "t")
		start := time.Now()
		var woken atomic.Int32
		for range 100 {
			go func() {
				s.wait(t.Context(), k, 25*time.Second, isNews)
				r, _ := s.look(t.Context(), k)
				if r.Login.OpenID == "alice" && time.Since(start) == 3*time.Second {
					woken.Add(1)
				}
			}()
		}
		time.Sleep(3 * time.Second)
		s.scans(t, k, "alice")
		if synctest.Wait(); woken.Load() != 100 || len(s.waiting.byKey) != 0 {
			t.Errorf("%d of 100 learned of the login at once; %d are waited for", woken.Load(), len(s.waiting.byKey))
		}
	})
}

func TestWaitEnds(t *testing.T) {
	for name, test := range map[string]struct {
		ttl, wait, cancel, took time.Duration
		want                    status
	}{
		"when its time is over":        {time.Minute, 25 * time.Second, time.Hour, 25 * time.Second, statusPending},
		"when the ticket expires":      {9 * time.Second, 25 * time.Second, time.Hour, 9 * time.Second, statusExpired},
		"when the context ends":        {time.Minute, 25 * time.Second, time.Second, time.Second, statusPending},
		"at once with a negative wait": {time.Minute, -1, time.Hour, 0, statusPending},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := emptyStore(t, test.ttl, 10)
			k := s.start(t, "t")
			ctx, cancel := context.WithTimeout(t.Context(), test.cancel)
			defer cancel()
			start := time.Now()
			s.wait(ctx, k, test.wait, func(*record) bool { return false })
			took := time.Since(start)
			r, err := s.look(t.Context(), k)
			must(t, err)
			if r.Status != test.want || took != test.took {
				t.Errorf("%s: %q after %v, want %q after %v", name, r.Status, took, test.want, test.took)
			}
			if len(s.waiting.byKey) != 0 {
				t.Errorf("%s: somebody still waits", name)
			}
		})
	}
}

func TestNoWakeUpIsLost(t *testing.T) {
	s := emptyStore(t, time.Minute, 10_000)
	for i := range 500 {
		k := s.start(t, strconv.Itoa(i))
		var wg sync.WaitGroup
		wg.Go(func() { s.scans(t, k, "alice") })
		s.wait(t.Context(), k, 20*time.Second, isNews)
		r, err := s.look(t.Context(), k)
		if wg.Wait(); err != nil || r.Status != statusDone {
			t.Fatalf("%q, %v", r.Status, err)
		}
	}
}

// raced runs a hundred calls at once, and returns which succeed.
func raced(call func(i int) bool) (winners []int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range 100 {
		wg.Go(func() {
			<-start // so that all are at it at once
			if call(i) {
				mu.Lock()
				defer mu.Unlock()
				winners = append(winners, i)
			}
		})
	}
	close(start)
	wg.Wait()
	return winners
}

func TestFirstScanWinsARace(t *testing.T) {
	s := emptyStore(t, time.Minute, 10_000)
	for i := range 20 {
		k := s.start(t, strconv.Itoa(i))
		winners := raced(func(i int) bool { return s.scans(t, k, strconv.Itoa(i)) })
		if got := s.stands(t, k).Login.OpenID; len(winners) != 1 || got != strconv.Itoa(winners[0]) {
			t.Fatalf("%v won, %q is logged in", winners, got)
		}
	}
}

func TestOneDecisionUnderAnyRace(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	s.confirm = true
	k := s.start(t, "t")
	s.scans(t, k, "alice")
	winners := raced(func(i int) bool {
		ok, err := s.decide(t.Context(), k, i%2 == 0)
		return ok && err == nil
	})
	r := s.stands(t, k)
	if len(winners) != 1 || (r.Status == statusDone) != (winners[0]%2 == 0) ||
		(r.Status == statusDone) != (r.Login.OpenID == "alice") {
		t.Errorf("%v decided: %+v", winners, r)
	}
}

func TestACodeIsClaimedOnce(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	k := s.startAuth(t, "t")
	claims := func(code string) bool {
		_, first, err := s.claim(t.Context(), k, code)
		return first && err == nil
	}
	if winners := raced(func(int) bool { return claims("code") }); len(winners) != 1 {
		t.Errorf("%d claims of one code", len(winners))
	}
	if !claims("another's") {
		t.Error("another person has to wait for the first")
	}
	for _, test := range []struct {
		code string
		want outcome
	}{{"another's", outcomeLogin}, {"code", outcomeUsed}} {
		r, err := s.settle(t.Context(), k, test.code, outcomeLogin, login{OpenID: "of " + test.code})
		must(t, err)
		if got, _ := r.outcome(test.code); got != test.want || r.Login.OpenID != "of another's" {
			t.Errorf("what came of %q: %q, want %q; logged in: %+v", test.code, got, test.want, r.Login)
		}
	}
	if claims("third") {
		t.Error("a finished ticket takes a code")
	}
}

func TestACodeWhoseReplicaDiedIsClaimedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k := s.startAuth(t, "t")
		s.claim(t.Context(), k, "code")
		time.Sleep(claimTTL)
		if _, again, err := s.claim(t.Context(), k, "code"); again || err != nil {
			t.Errorf("while it may be on its way: %v, %v", again, err)
		}
		time.Sleep(time.Nanosecond)
		if r, again, err := s.claim(t.Context(), k, "code"); !again || err != nil || len(r.Codes) != 1 {
			t.Errorf("later: %v, %v, %d codes", again, err, len(r.Codes))
		}
	})
}

func TestInvalidCodesDoNotUseUpATicket(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	k := s.startAuth(t, "t")
	for i := range 5 * maxCodes {
		code := strconv.Itoa(i)
		if _, first, _ := s.claim(t.Context(), k, code); !first {
			t.Fatalf("code %d is not taken", i)
		}
		r, _ := s.settle(t.Context(), k, code, outcomeExpired, login{})
		if came, known := r.outcome(code); known || came != outcomeExpired {
			t.Fatalf("code %d: %q", i, came)
		}
	}
	for i := range maxCodes {
		s.claim(t.Context(), k, strconv.Itoa(i))
	}
	if r, first, _ := s.claim(t.Context(), k, "one more"); first || len(r.Codes) != maxCodes {
		t.Errorf("%d codes are kept, want %d", len(r.Codes), maxCodes)
	}
}

func TestACodeOfATicketThatExpiresMeanwhileIsNoLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k := s.startAuth(t, "t")
		s.claim(t.Context(), k, "code")
		time.Sleep(time.Minute)
		r, err := s.settle(t.Context(), k, "code", outcomeLogin, login{OpenID: "alice"})
		if came, _ := r.outcome("code"); came != outcomeExpired || err != nil {
			t.Errorf("%q, %v", came, err)
		}
	})
}
