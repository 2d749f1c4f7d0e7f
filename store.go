package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync"
	"time"
)

const (
	// resultTTL is how long a login stays readable after the scan, so that a
	// browser that lost the answer can ask again.
	resultTTL = 60 * time.Second
	// decisionTTL is how long the phone has to confirm a login, at least: a scan
	// just before the end of a ticket leaves time to look.
	decisionTTL = 90 * time.Second
	// lookAgain is how often a wait reads a record that replicas share, in case the
	// news of a change got lost.
	lookAgain = 5 * time.Second
)

var errTooManyTickets = errors.New("too many live tickets")

// A key names a ticket without giving it away: the first 16 bytes of its
// SHA-256. In hex it is flow A's scene and flow B's OAuth state.
type key [16]byte

// digest returns the key of a ticket, or of another secret.
func digest(ticket string) key {
	sum := sha256.Sum256([]byte(ticket))
	return key(sum[:16])
}

// aside returns the key of what no ticket names: the other half of the SHA-256,
// so that a poll for the same text does not find it.
func aside(kind, name string) key {
	sum := sha256.Sum256([]byte(kind + " " + name))
	return key(sum[16:])
}

func (k key) String() string { return hex.EncodeToString(k[:]) }

// MarshalText writes a key in hex, for JSON.
func (k key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

func (k *key) UnmarshalText(text []byte) error {
	*k = parseKey(string(text))
	return nil
}

// parseKey reads a key in hex. Anything else yields the zero key, which names no ticket.
func parseKey(text string) (k key) {
	if sum, err := hex.DecodeString(text); err == nil && len(sum) == len(k) {
		k = key(sum)
	}
	return k
}

// A flow is one of the ways to log in. A ticket of one cannot be completed
// through another.
type flow string

const (
	flowScan flow = "scan" // A: parametric QR code, completed by a push
	flowAuth flow = "auth" // B: web authorization, completed by the callback
	flowCode flow = "code" // C: digits, completed by a message
	flowAPI  flow = "api"  // wechat-server's protocol: digits that we send, completed by its client
)

// A status is where a login stands, in the words of the poll's answer.
type status string

const (
	statusPending  status = "pending"
	statusScanned  status = "scanned" // where a login is to be confirmed on the phone
	statusDone     status = "done"
	statusDeclined status = "declined"
	statusExpired  status = "expired" // of no record: the ticket has ended, or never was
)

// A login is who has scanned.
type login struct {
	OpenID   string `json:"openid,omitzero"`
	UnionID  string `json:"unionid,omitzero"`
	Nickname string `json:"nickname,omitzero"`
	Avatar   string `json:"avatar,omitzero"` // the URL of a picture
}

// A record is what is known of one ticket. It never changes: another takes its place.
type record struct {
	Flow   flow   // "" of what is no login, but kept beside
	Shown  string // flow A: what the QR code says; flow C and the API: the digits; flow B: "", as its key says it
	Asker  asker  // who asked for the ticket
	Status status
	Login  login     // of the statuses scanned and done; of the API, from the start
	Since  time.Time // when the ticket came to its status
	Ends   time.Time // of the status: from then on the ticket has expired
	Codes  []attempt // of flow B, never changed in place
	Names  key       `json:",omitzero"` // of digits, their ticket; of a message, the ticket it went to or came for
	held   string    // in Redis: the record as it is there
}

// waits tells whether somebody may still log in, or confirm, with the ticket.
func (r *record) waits() bool { return r.Status == statusPending || r.Status == statusScanned }

// left returns how long the ticket's status can last.
func (r *record) left() time.Duration { return time.Until(r.Ends) }

// now returns the record if it has not ended, else one of the status expired. There
// may be none: r may be nil.
func (r *record) now() record {
	if r == nil || r.left() <= 0 {
		return record{Status: statusExpired}
	}
	return *r
}

// A store holds the rules of a ticket's life. Every change is one swap of the
// ticket's record for the next, and whoever won the swap does what
// follows from it.
type store struct {
	ttl       time.Duration
	confirm   bool // a scan must be confirmed
	records   records
	lookAgain time.Duration         // how often a wait looks again, in case nobody wakes it
	waiting   waiters               // who waits for a change
	onStatus  func(k key, r record) // is told of each new status of a ticket
}

// records is where the records of tickets are kept: localRecords, or redis.
type records interface {
	// ready returns why no record can be added now: errTooManyTickets or
	// errStoreUnavailable.
	ready() error
	// add keeps a record until it ends. It is false if the key has one already.
	add(ctx context.Context, k key, r *record) (bool, error)
	// get returns a record, which may have ended; nil if there is none.
	get(ctx context.Context, k key) (*record, error)
	// swap puts next in the place of old, as get returned it. It is true for one
	// caller alone.
	swap(ctx context.Context, k key, old, next *record) (bool, error)
}

// newStore returns a store whose tickets each wait for ttl.
func newStore(ttl time.Duration, kept records) *store {
	return &store{ttl: ttl, records: kept, lookAgain: time.Hour, onStatus: func(key, record) {},
		waiting: waiters{byKey: make(map[key]*waiter)}}
}

// begin makes ticket the ticket of a wait that starts now. It returns
// errTooManyTickets at the cap, and an error rather than give one ticket to two
// browsers.
func (s *store) begin(ctx context.Context, ticket string, f flow, shown string, by asker) error {
	now := time.Now()
	_, isNew, err := s.keep(ctx, digest(ticket), record{Flow: f, Shown: shown, Asker: by, Status: statusPending,
		Since: now, Ends: now.Add(s.ttl)})
	if err == nil && !isNew {
		err = errors.New("this ticket was issued before")
	}
	return err
}

// look returns the record of a ticket, exact to the nanosecond: of one that has
// ended, or never was, it has the status expired and nothing else.
func (s *store) look(ctx context.Context, k key) (record, error) {
	r, err := s.records.get(ctx, k)
	return r.now(), err
}

// change swaps the record of a ticket, as look returns it, for what next makes of
// it, and wakes whoever waits. It returns the record that holds now, and whether that is
// next's: next returns false to leave the record as it is. When others change the
// record meanwhile, next is called again, with theirs.
func (s *store) change(ctx context.Context, k key, next func(record) (record, bool)) (record, bool, error) {
	for {
		old, err := s.records.get(ctx, k)
		held := old.now()
		if err != nil {
			return held, false, err
		}
		r, ok := next(held)
		if !ok {
			return held, false, nil
		}
		if old == nil {
			ok, err = s.records.add(ctx, k, &r)
		} else {
			ok, err = s.records.swap(ctx, k, old, &r)
		}
		if err != nil {
			return held, false, err
		}
		if !ok {
			continue // somebody was first
		}
		s.waiting.wake(k)
		if r.Flow != "" && (r.Status != held.Status || r.Names != held.Names) {
			s.onStatus(k, r)
		}
		return r, true, nil
	}
}

// keep puts r under k, unless a live record is there. It returns the record that is
// there now, and whether that is r.
func (s *store) keep(ctx context.Context, k key, r record) (record, bool, error) {
	return s.change(ctx, k, func(held record) (record, bool) { return r, held.Status == statusExpired })
}

// become returns r with its next status, which ends after life.
func (r record) become(next status, life time.Duration) record {
	r.Status, r.Since = next, time.Now()
	r.Ends = r.Since.Add(life)
	return r
}

// logIn returns r with a login, which is yet to be confirmed where that is asked for.
func (s *store) logIn(r record, who login) record {
	r.Login = who
	if s.confirm {
		return r.become(statusScanned, max(r.left(), decisionTTL))
	}
	return r.become(statusDone, resultTTL)
}

// complete logs somebody in. It is true for the one call that did: the first
// while the ticket waits, through the ticket's own flow. Any other changes
// nothing.
func (s *store) complete(ctx context.Context, k key, f flow, who login) (record, bool, error) {
	return s.change(ctx, k, func(r record) (record, bool) {
		return s.logIn(r, who), r.Status == statusPending && r.Flow == f
	})
}

// decide ends the wait for a decision, once: with the login, or without. It is
// false if none is waited for.
func (s *store) decide(ctx context.Context, k key, yes bool) (bool, error) {
	_, decided, err := s.change(ctx, k, func(r record) (record, bool) {
		next := r.become(statusDone, resultTTL)
		if !yes {
			next.Status, next.Login = statusDeclined, login{}
		}
		return next, r.Status == statusScanned
	})
	return decided, err
}

// wait returns as soon as news says so of the ticket's record, or when the ticket can
// have no news any more. It returns after d at the latest, and when ctx ends. The error
// is of a record that cannot be read.
func (s *store) wait(ctx context.Context, k key, d time.Duration, news func(*record) bool) error {
	for deadline := time.Now().Add(d); ; {
		changed := s.waiting.join(k) // before the look: a change after it wakes us
		r, err := s.records.get(ctx, k)
		isOver := err != nil || r == nil || r.left() <= 0 || !r.waits() || !time.Now().Before(deadline)
		if isOver || news(r) {
			s.waiting.leave(k, changed)
			return err
		}
		timer := time.NewTimer(min(time.Until(deadline), r.left(), s.lookAgain))
		select {
		case <-changed.woken:
		case <-timer.C:
		case <-ctx.Done():
			deadline = time.Now()
		}
		timer.Stop()
		s.waiting.leave(k, changed)
	}
}

// waiters are those who wait for the record of a ticket to change.
type waiters struct {
	mu    sync.Mutex // guards byKey, and the counts in it
	byKey map[key]*waiter
}

// A waiter is all who wait for the next change of one record.
type waiter struct {
	woken chan struct{} // closed by wake
	count int           // of those who wait
}

// join begins a wait for the next change of a record. Whoever joins must leave.
func (w *waiters) join(k key) *waiter {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.byKey[k]
	if c == nil {
		c = &waiter{woken: make(chan struct{})}
		w.byKey[k] = c
	}
	c.count++
	return c
}

func (w *waiters) leave(k key, c *waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.count--; c.count == 0 && w.byKey[k] == c {
		delete(w.byKey, k)
	}
}

// wake tells all who wait that the record of a ticket has changed.
func (w *waiters) wake(k key) {
	w.mu.Lock()
	c := w.byKey[k]
	delete(w.byKey, k)
	w.mu.Unlock()
	if c != nil {
		close(c.woken)
	}
}

// wakeAll makes all who wait look again: changes may have been missed.
func (w *waiters) wakeAll() {
	w.mu.Lock()
	all := w.byKey
	w.byKey = make(map[key]*waiter)
	w.mu.Unlock()
	for _, c := range all {
		close(c.woken)
	}
}
