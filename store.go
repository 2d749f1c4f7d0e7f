package main

import (
	"cmp"
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

	blockSize = 64 // tickets, in the store's line
)

var (
	errTooManyTickets = errors.New("too many live tickets")
	errCodeUsed       = errors.New("somebody has logged in already, or too many codes were tried")
)

// A key names a ticket without giving it away: the first 16 bytes of its
// SHA-256. In hex it is the OAuth state of flow B.
type key [16]byte

// digest returns the key of a ticket, or of another secret.
func digest(ticket string) key {
	sum := sha256.Sum256([]byte(ticket))
	return key(sum[:16])
}

func (k key) String() string { return hex.EncodeToString(k[:]) }

// parseKey reads a key in hex. From what is none it makes the key of no ticket.
func parseKey(text string) (k key) {
	if sum, err := hex.DecodeString(text); err == nil && len(sum) == len(k) {
		k = key(sum)
	}
	return k
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

// A login is who has scanned.
type login struct {
	OpenID   string `json:"openid,omitzero"`
	UnionID  string `json:"unionid,omitzero"`
	Nickname string `json:"nickname,omitzero"`
	Avatar   string `json:"avatar,omitzero"` // the URL of a picture
}

// A state is where a login stands.
type state struct {
	status status
	login  login       // of the statuses scanned and done
	secret string      // of the status scanned: who has it may decide
	at     time.Time   // when the login was done or declined
	ends   moment      // of the time to read that; 0 while the ticket waits
	told   atomic.Bool // the browser knows who has logged in
}

var (
	pending = &state{status: statusPending}
	expired = &state{status: statusExpired}
)

// A moment is the time since the store was made: a third of a time.Time, and
// quicker to look up.
type moment = time.Duration

// A ticket is one browser's wait for a scan. There can be very many, most of
// which nobody ever scans: each byte counts.
type ticket struct {
	key      key
	says     string                // flow A: what the QR code says; "" in flow B, where it follows from key
	deadline moment                // end of the wait
	state    atomic.Pointer[state] // nil while nobody has scanned; set under store.mu
	*extras                        // nil, then set for good: before the ticket is found, or under store.mu
}

// The extras of a ticket are what only few of them need.
type extras struct {
	asker    *asker               // who asked for the ticket; set if logins are to be confirmed
	changed  chan struct{}        // closed when the state changes; nil while nobody waits; guarded by store.mu
	outcomes map[key]func() error // flow B: by each code tried so far; guarded by store.mu
}

func (t *ticket) flow() flow {
	if t.says == "" {
		return flowAuth
	}
	return flowScan
}

// A store holds the live tickets, in memory only.
//
// All tickets wait equally long, so a line of them does instead of a timer for
// each: the sweeper wakes for the first and never looks at the rest. It is a line
// of blocks, as the garbage collector has less to do with few large things.
type store struct {
	ttl     time.Duration
	max     int
	confirm bool                         // a scan must be confirmed
	step    func(t *ticket, step string) // is told what happens to tickets, with mu held
	start   time.Time                    // moments count from here
	tickets sync.Map                     // by key, *ticket

	mu      sync.Mutex  // guards the fields below, and what changes in a ticket
	live    int         // entries in tickets
	line    [][]ticket  // blocks, by deadline; those that are done meanwhile stay in line
	sweeper *time.Timer // runs sweep at the first deadline, while any waits
}

// newStore returns a store of at most max tickets that each wait for ttl.
func newStore(ttl time.Duration, max int) *store {
	return &store{ttl: ttl, max: max, start: time.Now(), step: func(*ticket, string) {}}
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

// begin makes secret the ticket of a wait that starts now: of flow A, with what
// its QR code says, or of flow B, with "". It returns errTooManyTickets at the
// cap, and an error rather than give one ticket to two browsers.
func (s *store) begin(secret, says string, asker *asker) error {
	key := digest(secret)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live >= s.max {
		return errTooManyTickets
	}
	if s.find(key) != nil {
		return errors.New("this ticket was issued before")
	}
	if len(s.line) == 0 {
		s.sweeper = time.AfterFunc(s.ttl, s.sweep)
	}
	if n := len(s.line); n == 0 || len(s.line[n-1]) == cap(s.line[n-1]) {
		s.line = append(s.line, make([]ticket, 0, blockSize))
	}
	block := &s.line[len(s.line)-1]
	*block = append(*block, ticket{key: key, says: says, deadline: time.Since(s.start) + s.ttl})
	t := &(*block)[len(*block)-1]
	if asker != nil {
		t.extras = &extras{asker: asker}
	}
	s.tickets.Store(key, t)
	s.live++
	s.step(t, "begun")
	return nil
}

// find returns a ticket, which may have expired just now; nil if there is none.
func (s *store) find(key key) *ticket {
	v, _ := s.tickets.Load(key)
	t, _ := v.(*ticket)
	return t
}

// look returns how a ticket stands, and how long that can last, exact to the
// nanosecond. No ticket has expired.
func (s *store) look(t *ticket) (st *state, left time.Duration) {
	if t == nil {
		return expired, 0
	}
	st = cmp.Or(t.state.Load(), pending)
	left = cmp.Or(st.ends, t.deadline) - time.Since(s.start)
	if left <= 0 {
		return expired, 0
	}
	return st, left
}

// complete logs somebody in, or asks for a decision where that is to be
// confirmed. It is true for the one call that did: the first while the ticket
// waits, through the ticket's own flow. Any other changes nothing.
func (s *store) complete(key key, flow flow, who login) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.find(key)
	if st, _ := s.look(t); st != pending || t.flow() != flow {
		return false
	}
	s.step(t, "scanned")
	if s.confirm {
		s.changeLocked(t, &state{status: statusScanned, login: who, secret: rand.Text()})
	} else {
		s.finishLocked(t, &state{status: statusDone, login: who})
	}
	return true
}

// decide ends the wait for a decision, once: with the login, or without. It is
// false if none is waited for, or the secret is another.
func (s *store) decide(t *ticket, secret string, yes bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.holds(t, secret) {
		return false
	}
	if yes {
		s.step(t, "confirmed")
		s.finishLocked(t, &state{status: statusDone, login: t.state.Load().login})
	} else {
		s.step(t, "declined")
		s.finishLocked(t, &state{status: statusDeclined})
	}
	return true
}

// holds tells whether a ticket waits for the decision of whoever has the secret.
func (s *store) holds(t *ticket, secret string) bool {
	st, _ := s.look(t)
	return st.status == statusScanned && subtle.ConstantTimeCompare([]byte(secret), []byte(st.secret)) == 1
}

// finishLocked gives a ticket its last state, for resultTTL.
func (s *store) finishLocked(t *ticket, st *state) {
	st.at = time.Now()
	st.ends = st.at.Sub(s.start) + resultTTL
	s.changeLocked(t, st)
	time.AfterFunc(resultTTL, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forgetLocked(t)
	})
}

// changeLocked gives a ticket its next state, and wakes who waits for that.
func (s *store) changeLocked(t *ticket, st *state) {
	t.state.Store(st)
	if t.extras != nil && t.changed != nil {
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
	s.mu.Lock()
	if t.extras == nil {
		t.extras = new(extras)
	}
	outcome, seen := t.outcomes[digest(code)]
	if !seen {
		if st, _ := s.look(t); st != pending || len(t.outcomes) == maxCodes {
			s.mu.Unlock()
			return errCodeUsed
		}
		outcome = sync.OnceValue(func() error {
			who, err := exchange()
			if err == nil && !s.complete(t.key, flowAuth, who) {
				err = errCodeUsed
			}
			return err
		})
		if t.outcomes == nil {
			t.outcomes = make(map[key]func() error)
		}
		t.outcomes[digest(code)] = outcome
	}
	s.mu.Unlock()
	return outcome()
}

// wait returns once the status of a ticket is not seen, after d, or when ctx
// ends, whichever is first. An empty seen is the status of now.
func (s *store) wait(ctx context.Context, t *ticket, seen status, d time.Duration) {
	s.mu.Lock()
	st, left := s.look(t)
	if left <= 0 || st.ends != 0 || seen != "" && seen != st.status {
		s.mu.Unlock()
		return
	}
	if t.extras == nil {
		t.extras = new(extras)
	}
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	changed := t.changed
	s.mu.Unlock()
	timer := time.NewTimer(min(d, left))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// sweep forgets the tickets that nobody has scanned in time.
func (s *store) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.line) > 0 {
		t := &s.line[0][0]
		if left := t.deadline - time.Since(s.start); left > 0 {
			s.sweeper.Reset(left)
			return
		}
		if cmp.Or(t.state.Load(), pending).ends == 0 {
			s.step(t, "expired")
			s.forgetLocked(t)
		}
		if s.line[0] = s.line[0][1:]; len(s.line[0]) == 0 {
			s.line[0], s.line = nil, s.line[1:]
		}
	}
}

func (s *store) forgetLocked(t *ticket) {
	s.tickets.Delete(t.key)
	s.live--
}
