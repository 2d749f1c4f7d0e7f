package main

import (
	"crypto/sha256"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// A memory keeps values by key, each until it is due, and at most max of them.
// When it is full of what is not due, a tenth is forgotten, whichever.
type memory[V any] struct {
	max     int
	prune   int // the size at which to look for what is due
	entries map[string]dueValue[V]
}

type dueValue[V any] struct {
	value V
	due   time.Time
}

func newMemory[V any](max int) memory[V] {
	return memory[V]{max: max, entries: make(map[string]dueValue[V])}
}

// get returns a value that is not due yet.
func (m *memory[V]) get(key string) (v V, ok bool) {
	if e := m.entries[key]; time.Now().Before(e.due) {
		return e.value, true
	}
	return v, false
}

// put looks through the whole memory only when it has doubled since the last
// time, or is full.
func (m *memory[V]) put(key string, v V, life time.Duration) {
	now := time.Now()
	if _, known := m.entries[key]; !known && len(m.entries) >= min(m.prune, m.max) {
		maps.DeleteFunc(m.entries, func(_ string, e dueValue[V]) bool { return !now.Before(e.due) })
		if len(m.entries) >= m.max {
			maps.DeleteFunc(m.entries, func(string, dueValue[V]) bool { return len(m.entries) >= m.max-m.max/10 })
		}
		m.prune = max(1000, 2*len(m.entries))
	}
	m.entries[key] = dueValue[V]{v, now.Add(life)}
}

// A limiter lets each key pass rate times in any minute.
type limiter struct {
	rate int // 0 lets everything pass

	mu     sync.Mutex // guards passed
	passed memory[[]time.Time]
}

// maxKeys bounds a limiter's memory: some 30 MB if each has passed 60 times.
const maxKeys = 20_000

func newLimiter(rate int) *limiter {
	return &limiter{rate: rate, passed: newMemory[[]time.Time](maxKeys)}
}

// pass returns 0 if the key may pass now, else how long it must wait.
func (l *limiter) pass(key string) time.Duration {
	if l.rate == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	times, _ := l.passed.get(key)
	if len(times) == l.rate {
		if wait := times[0].Add(time.Minute).Sub(now); wait > 0 {
			return wait
		}
		times = times[1:]
	}
	l.passed.put(key, append(times, now), time.Minute)
	return 0
}

// full tells whether the key may not pass now.
func (l *limiter) full(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	times, _ := l.passed.get(key)
	return l.rate > 0 && len(times) == l.rate && time.Since(times[0]) < time.Minute
}

// client returns who asks, for a limiter: an IPv4 address, or the /64 of an IPv6
// address, since that much is one customer's. Behind loopback (nginx, an ngrok
// agent), a Unix socket and the trusted proxies it is the last hop of
// X-Forwarded-For that is none of these. ok is false for a local peer that
// forwards for nobody.
func client(r *http.Request, trusted []netip.Prefix) (key string, ok bool) {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr().Unmap().WithZone("")
	for _, hop := range slices.Backward(strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")) {
		isProxy := !addr.IsValid() || addr.IsLoopback() || slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
		if hop = strings.TrimSpace(hop); hop == "" || !isProxy {
			break
		}
		withPort, err := netip.ParseAddrPort(hop)
		if addr = withPort.Addr(); err != nil {
			addr, err = netip.ParseAddr(hop)
		}
		if err != nil {
			return "unknown", true
		}
		addr = addr.Unmap().WithZone("")
	}
	if addr.Is6() && !addr.IsLoopback() {
		prefix, _ := addr.Prefix(64)
		return prefix.String(), true
	}
	return addr.String(), addr.IsValid() && !addr.IsLoopback()
}

// A pushGuard knows the pushes that have come lately. WeChat's plain signature
// does not cover the body, so whoever has seen one could sign anything with it.
type pushGuard struct {
	maxSkew time.Duration // how old or early a push may be; 0 does not look

	mu    sync.Mutex        // guards seen and order
	seen  map[string]pushed // by signature
	order []string          // the signatures, the oldest first
}

// A pushed is a push that has come.
type pushed struct {
	body [sha256.Size]byte
	due  time.Time // when it may be forgotten
}

// maxPushes bounds a pushGuard's memory, to some 20 MB.
const maxPushes = 100_000

func newPushGuard(maxSkew time.Duration) *pushGuard {
	return &pushGuard{maxSkew: maxSkew, seen: make(map[string]pushed)}
}

// fresh tells whether a push's timestamp, in Unix seconds, is within maxSkew.
func (g *pushGuard) fresh(seconds int64) bool {
	return g.maxSkew == 0 || time.Since(time.Unix(seconds, 0)).Abs() <= g.maxSkew
}

// admit tells whether a signature carries a body for the first time. forged is
// true if it has carried another. When the memory is full, the oldest is forgotten.
func (g *pushGuard) admit(signature string, body []byte) (first, forged bool) {
	sum, now := sha256.Sum256(body), time.Now()
	// A signature can be fresh from maxSkew before its time to maxSkew after it,
	// both included.
	life := 2*g.maxSkew + time.Second
	if g.maxSkew == 0 {
		life = time.Hour
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.order) > 0 && !now.Before(g.seen[g.order[0]].due) {
		g.forget()
	}
	if earlier, known := g.seen[signature]; known {
		return false, earlier.body != sum
	}
	if len(g.order) == maxPushes {
		g.forget()
	}
	g.seen[signature] = pushed{sum, now.Add(life)}
	g.order = append(g.order, signature)
	return true, false
}

// forget forgets the oldest. It needs the lock.
func (g *pushGuard) forget() {
	delete(g.seen, g.order[0])
	g.order = g.order[1:]
}

// A parked poll takes some 17 kB, so all of them 350 MB. The caps are beyond what
// honest people need: a ticket has one page, and over the caps a page polls each
// second instead.
const (
	maxParked          = 20_000
	maxParkedPerTicket = 8   // polls whose browser is gone may linger
	maxParkedPerClient = 200 // an office behind one address
	maxParkedText      = 512 // bytes, of its URL and of each header that is kept; a page's have a fifth
)

// A parking counts the polls that are parked.
type parking struct {
	mu      sync.Mutex // guards the fields below
	total   int
	tickets map[key]int
	clients map[string]int
}

// enter takes a place for a poll, which leave gives back. It is false if a cap is
// reached; perClient is the client's.
func (p *parking) enter(ticket key, client string, perClient int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total == maxParked || p.tickets[ticket] == maxParkedPerTicket || p.clients[client] == perClient {
		return false
	}
	if p.tickets == nil {
		p.tickets, p.clients = make(map[key]int), make(map[string]int)
	}
	p.total++
	p.tickets[ticket]++
	p.clients[client]++
	return true
}

func (p *parking) leave(ticket key, client string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total--
	if p.tickets[ticket]--; p.tickets[ticket] == 0 {
		delete(p.tickets, ticket)
	}
	if p.clients[client]--; p.clients[client] == 0 {
		delete(p.clients, client)
	}
}
