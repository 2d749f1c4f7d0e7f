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

// start begins a ticket of a flow.
func (s *store) start(t testing.TB, f flow) key {
	t.Helper()
	ticket := rand.Text()
	must(t, s.begin(t.Context(), ticket, f, "http://weixin.qq.com/q/02abc", asker{}))
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

// claims tells whether a code is to be exchanged.
func (s *store) claims(t testing.TB, k key, code string) bool {
	t.Helper()
	_, first, err := s.claim(t.Context(), k, code)
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

func TestATicketAndItsResultEndToTheNanosecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, 5*time.Minute, 10)
		unscanned, k := s.start(t, flowScan), s.start(t, flowScan)
		time.Sleep(5*time.Minute - 1)
		equal(t, "1 ns before its end a ticket is", s.stands(t, unscanned).Status, statusPending)
		if !s.scans(t, k, "alice") || s.scans(t, k, "bob") {
			t.Fatal("a live ticket logs in nobody, or two")
		}
		time.Sleep(time.Nanosecond)
		if got := s.stands(t, unscanned).Status; got != statusExpired || s.scans(t, unscanned, "late") {
			t.Errorf("at its end the ticket is %q, or logs in", got)
		}
		time.Sleep(resultTTL - 2)
		equal(t, "the result is of", s.stands(t, k).Login.OpenID, "alice")
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
			k := s.start(t, flowScan)
			time.Sleep(at)
			s.scans(t, k, "alice")
			r := s.stands(t, k)
			equal(t, "left to decide", r.left(), left)
			time.Sleep(left - 1)
			if decided, err := s.decide(t.Context(), k, true); !decided || err != nil {
				t.Errorf("a decision in time: %v, %v", decided, err)
			}
		})
	}
}

func TestSweepForgetsWhatHasEndedAndTheCapCountsWhatIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		memory := &localRecords{max: 11}
		s := newStore(24*time.Hour, memory) // however long tickets live, results do not stay
		events := make(map[status]int)
		var mu sync.Mutex
		s.onStatus = func(_ key, r record) {
			mu.Lock()
			defer mu.Unlock()
			events[r.Status]++
		}
		go memory.sweep(ctx, s.onStatus)
		s.keep(ctx, key{}, record{Ends: time.Now().Add(resultTTL)}) // which is no ticket, and no event
		for i := range 10 {
			if k := s.start(t, flowScan); i < 4 {
				s.scans(t, k, "o")
			}
		}
		for _, step := range []struct {
			after  time.Duration
			held   int64
			isFull bool
		}{{resultTTL - 1, 11, true}, {sweepEvery, 6, false}, {24 * time.Hour, 0, false}} {
			time.Sleep(step.after)
			synctest.Wait()
			held := int64(0)
			for range memory.byKey.Range {
				held++
			}
			equal(t, "held", held, step.held)
			equal(t, "counted", memory.count.Load(), held)
			equal(t, "full", errors.Is(memory.ready(), errTooManyTickets), step.isFull)
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

func TestATicketIsIssuedOnceForItsFlow(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	scan, auth := s.start(t, flowScan), s.start(t, flowAuth)
	if _, first, _ := s.complete(t.Context(), scan, flowAuth, login{OpenID: "o"}); first || s.scans(t, auth, "o") ||
		s.claims(t, scan, "code") {
		t.Error("a ticket is completed through the other flow")
	}
	if s.scans(t, digest("never issued"), "o") || s.scans(t, key{}, "o") || s.claims(t, key{}, "code") {
		t.Error("a ticket that was never issued is completed")
	}
	must(t, s.begin(t.Context(), "t", flowScan, "x", asker{}))
	if s.begin(t.Context(), "t", flowScan, "x", asker{}) == nil {
		t.Error("one ticket is given to two browsers")
	}
	if memory, ok := s.records.(*localRecords); ok && memory.count.Load() != 3 {
		t.Error("it is counted twice")
	}
}

func isNews(r *record) bool { return r.Status != statusPending }

func TestAllWaitersWakeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k, start := s.start(t, flowScan), time.Now()
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
		go s.wait(t.Context(), k, time.Second, isNews) // who leaves takes nobody along
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
			k, start := s.start(t, flowScan), time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), test.cancel)
			defer cancel()
			s.wait(ctx, k, test.wait, func(*record) bool { return false })
			equal(t, name+" after", time.Since(start), test.took)
			equal(t, name, s.stands(t, k).Status, test.want)
			equal(t, name+" there wait", len(s.waiting.byKey), 0)
		})
	}
}

func TestAWaitLooksAgainWhereNobodyWakesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		s.lookAgain = lookAgain
		k, start, other := s.start(t, flowScan), time.Now(), newStore(time.Minute, s.records)
		time.AfterFunc(time.Second, func() { other.scans(t, k, "alice") })
		s.wait(t.Context(), k, 25*time.Second, isNews)
		equal(t, "news of another replica after", time.Since(start), lookAgain)
	})
}

func TestNoWakeUpIsLost(t *testing.T) {
	s := emptyStore(t, time.Minute, 10_000)
	for range 500 {
		k := s.start(t, flowScan)
		var wg sync.WaitGroup
		wg.Go(func() { s.scans(t, k, "alice") })
		s.wait(t.Context(), k, 20*time.Second, isNews)
		if wg.Wait(); s.stands(t, k).Status != statusDone {
			t.Fatal(s.stands(t, k).Status)
		}
	}
}

// TestOneCallWinsAnyRace has a hundred people scan at once, decide at once, and come
// with one code at once.
func TestOneCallWinsAnyRace(t *testing.T) {
	for range 20 {
		s := emptyStore(t, time.Minute, 10)
		s.confirm = true
		scanned, auth := s.start(t, flowScan), s.start(t, flowAuth)
		raced := func(call func(i int) bool) (winner int) {
			var won atomic.Int32
			var all sync.WaitGroup
			start := make(chan struct{})
			for i := range 100 {
				all.Go(func() {
					<-start // so that all are at it at once
					if call(i) {
						won.Add(1)
						winner = i // of one alone; else -race tells
					}
				})
			}
			close(start)
			all.Wait()
			equal(t, "winners", won.Load(), 1)
			return winner
		}
		scan := raced(func(i int) bool { return s.scans(t, scanned, strconv.Itoa(i)) })
		equal(t, "logged in", s.stands(t, scanned).Login.OpenID, strconv.Itoa(scan))
		decision := raced(func(i int) bool {
			ok, err := s.decide(t.Context(), scanned, i%2 == 0)
			return ok && err == nil
		})
		want, openID := statusDeclined, ""
		if decision%2 == 0 {
			want, openID = statusDone, strconv.Itoa(scan)
		}
		equal(t, "decided", s.stands(t, scanned).Status, want)
		equal(t, "after the decision, logged in", s.stands(t, scanned).Login.OpenID, openID)
		raced(func(int) bool { return s.claims(t, auth, "code") })
	}
}

// A rival is somebody who once changes a record just before another's swap.
type rival struct {
	records
	change func() // nil when it has
}

func (r *rival) swap(ctx context.Context, k key, old, next *record) (bool, error) {
	if change := r.change; change != nil {
		r.change = nil
		change()
	}
	return r.records.swap(ctx, k, old, next)
}

func TestTheFirstCodeThatIsSettledLogsIn(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	k := s.start(t, flowAuth)
	claimed := false
	s.records = &rival{s.records, func() { claimed = s.claims(t, k, "another's") }}
	if !s.claims(t, k, "code") || !claimed {
		t.Error("of two people at once, one is turned away")
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
	if s.claims(t, k, "third") {
		t.Error("a finished ticket takes a code")
	}
}

func TestACodeWhoseReplicaDiedIsClaimedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := emptyStore(t, time.Minute, 10)
		k := s.start(t, flowAuth)
		s.claims(t, k, "code")
		time.Sleep(claimTTL)
		equal(t, "while it may be on its way", s.claims(t, k, "code"), false)
		time.Sleep(time.Nanosecond)
		equal(t, "later", s.claims(t, k, "code"), true)
		equal(t, "codes", len(s.stands(t, k).Codes), 1)
		time.Sleep(time.Minute)
		r, err := s.settle(t.Context(), k, "code", outcomeLogin, login{OpenID: "alice"})
		came, _ := r.outcome("code")
		if came != outcomeExpired || err != nil || s.stands(t, k).Status != statusExpired {
			t.Errorf("a code of a ticket that expires meanwhile: %q, %v", came, err)
		}
	})
}

func TestACallbackWaitsForTheFirstWithItsCodeForNineSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, start := newWorld(t), time.Now()
		k := digest(w.begin(t, "getauthqr").Ticket)
		equal(t, "claimed", w.tickets.claims(t, k, "code"), true)
		out := w.do("GET", "/wechat/accessusercode?code=code&state="+k.String(), "")
		equal(t, "leads", out.Header().Get("Location"), notConfirmed+"unavailable")
		equal(t, "after", time.Since(start), requestTimeout)
	})
}

func TestInvalidCodesDoNotUseUpATicket(t *testing.T) {
	s := emptyStore(t, time.Minute, 10)
	k := s.start(t, flowAuth)
	for i := range 5 * maxCodes {
		code := strconv.Itoa(i)
		if !s.claims(t, k, code) {
			t.Fatalf("code %d is not taken", i)
		}
		r, _ := s.settle(t.Context(), k, code, outcomeExpired, login{})
		if came, known := r.outcome(code); known || came != outcomeExpired {
			t.Fatalf("code %d: %q", i, came)
		}
	}
	for i := range maxCodes {
		equal(t, "a code that is being exchanged is taken", s.claims(t, k, strconv.Itoa(i)), true)
	}
	equal(t, "one more is taken", s.claims(t, k, "one more"), false)
	equal(t, "codes", len(s.stands(t, k).Codes), maxCodes)
}
