package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// resultTTL is how long a login stays readable after the scan, so that a
	// browser that lost the answer can ask again.
	resultTTL = 60 * time.Second
	// maxCodes is how many OAuth codes may be tried on one ticket. Whoever
	// photographs a QR code can make up codes; each costs a call to WeChat.
	maxCodes = 5
)

var (
	errTooManyTickets = errors.New("too many live tickets")
	errCodeUsed       = errors.New("somebody has logged in already, or too many codes were tried")
)

// digest names a ticket without giving it away: the first 16 bytes of its
// SHA-256, in hex. In flow B it is the OAuth state.
func digest(ticket string) string {
	sum := sha256.Sum256([]byte(ticket))
	return hex.EncodeToString(sum[:16])
}

// A flow is one of the two ways to log in. A ticket of one cannot be completed
// through the other.
type flow string

const (
	flowScan flow = "scan" // A: parametric QR code, completed by a push
	flowAuth flow = "auth" // B: web authorization, completed by the callback
)

// status is where a login stands, in the words of the poll's answer.
type status string

const (
	statusPending  status = "pending"
	statusScanned  status = "scanned" // where a login is to be confirmed on the phone
	statusDone     status = "done"
	statusDeclined status = "declined"
	statusExpired  status = "expired" // also for a ticket that never was
)

// A login is who has scanned. All but openID may be empty.
type login struct {
	openID, unionID, nickname, avatar string
}

// A state is what a browser may know of its ticket.
type state struct {
	status  status
	expires time.Time // end of the wait, or of the time to read the login
	login   login     // set when status is done
}

// A ticket is one browser's wait for a scan.
type ticket struct {
	key      string // its digest
	flow     flow
	says     string    // flow A: what the QR code says; B's follows from key
	deadline time.Time // end of the wait

	result  atomic.Pointer[state] // nil until it is known who has logged in, or declined, then for good; set under store.mu
	claim   atomic.Pointer[claim] // nil until somebody has scanned what is to be confirmed; set under store.mu
	changed chan struct{}         // closed when the status changes; nil while nobody waits; guarded by store.mu
	told    atomic.Bool           // the browser knows who has logged in
	asker   *asker                // who asked for the ticket; nil unless logins are to be confirmed

	outcomes map[string]*outcome // flow B: of each code tried so far, by digest; guarded by store.mu
}

// An outcome is how the exchange of a code has ended.
type outcome struct {
	done chan struct{} // closed by redeem, once err is set
	err  error
}

// A claim is a login that waits to be confirmed by whoever has the secret.
type claim struct {
	login  login
	secret string
}

// A store holds the live tickets, in memory only.
//
// All tickets wait equally long, so a queue does instead of a timer for each
// ticket: the sweeper wakes for the first in line and never looks at the rest.
type store struct {
	ttl     time.Duration
	max     int
	confirm bool                         // a scan is only a claim
	step    func(t *ticket, step string) // is told what happens to tickets, with mu held
	tickets sync.Map                     // by digest, *ticket

	mu      sync.Mutex  // guards the fields below, and what changes in a ticket
	live    int         // entries in tickets
	waiting []*ticket   // by deadline; those that are done meanwhile stay in line
	sweeper *time.Timer // runs sweep at the first deadline, while any waits
}

// newStore returns a store of at most max tickets that each wait for ttl.
func newStore(ttl time.Duration, max int) *store {
	return &store{ttl: ttl, max: max, step: func(*ticket, string) {}}
}

// close ends the sweeper: nothing is told any more.
func (s *store) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.step = func(*ticket, string) {}
	if s.sweeper != nil {
		s.sweeper.Stop()
	}
}

// count returns how many tickets are live.
func (s *store) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

// begin makes secret the ticket of a wait that starts now. It returns
// errTooManyTickets at the cap, and an error rather than give one ticket to two
// browsers.
func (s *store) begin(secret string, flow flow, says string, asker *asker) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live >= s.max {
		return errTooManyTickets
	}
	t := &ticket{key: digest(secret), flow: flow, says: says, asker: asker, deadline: time.Now().Add(s.ttl)}
	if _, loaded := s.tickets.LoadOrStore(t.key, t); loaded {
		return errors.New("this ticket was issued before")
	}
	s.live++
	if s.waiting = append(s.waiting, t); len(s.waiting) == 1 {
		s.sweeper = time.AfterFunc(s.ttl, s.sweep)
	}
	s.step(t, "begun")
	return nil
}

// find returns a live ticket: one that waits, or whose result can still be
// read. Where there is none, ok is false and the ticket is one that has expired.
func (s *store) find(key string) (t *ticket, ok bool) {
	v, ok := s.tickets.Load(key)
	if !ok {
		return &ticket{key: key}, false
	}
	t = v.(*ticket)
	return t, t.state().status != statusExpired
}

// complete logs somebody in, or makes a claim where that is to be confirmed. It
// is true for the one call that did: the first while the ticket waits, through
// the ticket's own flow. Any other changes nothing.
func (s *store) complete(key string, flow flow, who login) bool {
	t, ok := s.find(key)
	if !ok || t.flow != flow {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.state().status != statusPending {
		return false
	}
	s.step(t, "scanned")
	if s.confirm {
		t.claim.Store(&claim{who, rand.Text()})
		s.tellLocked(t)
	} else {
		s.finishLocked(t, statusDone, who)
	}
	return true
}

// decide ends a claim, once: with the login, or without. It is false if there is
// none that waits, or the secret is not the claim's.
func (s *store) decide(t *ticket, secret string, yes bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !t.holds(secret) {
		return false
	}
	if yes {
		s.step(t, "confirmed")
		s.finishLocked(t, statusDone, t.claim.Load().login)
	} else {
		s.step(t, "declined")
		s.finishLocked(t, statusDeclined, login{})
	}
	return true
}

// holds tells whether the ticket has a claim with this secret that waits.
func (t *ticket) holds(secret string) bool {
	return t.state().status == statusScanned && subtle.ConstantTimeCompare([]byte(secret), []byte(t.claim.Load().secret)) == 1
}

func (s *store) finishLocked(t *ticket, status status, who login) {
	t.result.Store(&state{status, time.Now().Add(resultTTL), who})
	s.tellLocked(t)
	time.AfterFunc(resultTTL, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forgetLocked(t)
	})
}

// tellLocked wakes who waits for the ticket.
func (s *store) tellLocked(t *ticket) {
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}

// redeem completes a ticket of flow B with the person whom exchange finds
// behind an OAuth code. A code is exchanged once: a callback that is opened
// twice waits for the first and shares its outcome. It returns what exchange
// returned, or errCodeUsed when somebody has logged in with another code, the
// ticket expired meanwhile, or maxCodes have been tried.
func (s *store) redeem(t *ticket, code string, exchange func() (login, error)) error {
	key := digest(code)
	s.mu.Lock()
	o, seen := t.outcomes[key]
	if !seen {
		if t.state().status != statusPending || len(t.outcomes) == maxCodes {
			s.mu.Unlock()
			return errCodeUsed
		}
		if t.outcomes == nil {
			t.outcomes = make(map[string]*outcome)
		}
		o = &outcome{done: make(chan struct{}), err: errCodeUsed}
		t.outcomes[key] = o
	}
	s.mu.Unlock()
	if seen {
		<-o.done // exchange bounds its time
		return o.err
	}
	defer close(o.done)
	who, err := exchange()
	if err == nil && !s.complete(t.key, flowAuth, who) {
		err = errCodeUsed
	}
	o.err = err
	return err
}

// wait returns the state of a ticket once its status is not seen, after d, or
// when ctx ends, whichever is first. An empty seen is the status of now; with
// d ≤ 0 it asks without waiting.
func (s *store) wait(ctx context.Context, key string, seen status, d time.Duration) state {
	t, _ := s.find(key)
	if d <= 0 {
		return t.state()
	}
	st, changed := s.look(t)
	if changed == nil || seen != "" && seen != st.status {
		return st
	}
	timer := time.NewTimer(min(d, time.Until(t.deadline)))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
	}
	return t.state()
}

// look returns the state of a ticket, and a channel that is closed when its
// status changes; nil if that is for good.
func (s *store) look(t *ticket) (state, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := t.state()
	if st.status != statusPending && st.status != statusScanned {
		return st, nil
	}
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	return st, t.changed
}

// state returns how the ticket stands now, exact to the nanosecond.
func (t *ticket) state() state {
	st := state{status: statusPending, expires: t.deadline}
	if t.claim.Load() != nil {
		st.status = statusScanned
	}
	if result := t.result.Load(); result != nil {
		st = *result
	}
	if !time.Now().Before(st.expires) {
		return state{status: statusExpired}
	}
	return st
}

// sweep forgets the tickets that nobody has scanned in time.
func (s *store) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.waiting) > 0 {
		t := s.waiting[0]
		if left := time.Until(t.deadline); left > 0 {
			s.sweeper.Reset(left)
			return
		}
		if t.result.Load() == nil {
			s.step(t, "expired")
			s.forgetLocked(t)
		}
		s.waiting[0], s.waiting = nil, s.waiting[1:]
	}
}

func (s *store) forgetLocked(t *ticket) {
	s.tickets.Delete(t.key)
	s.live--
}
