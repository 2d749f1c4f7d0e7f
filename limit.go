package main

import (
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// A limiter lets each key pass rate times in any window.
type limiter struct {
	rate   int           // 0 lets everything pass
	window time.Duration // a minute, unless somebody sets another

	mu     sync.Mutex             // guards the fields below
	passed map[string][]time.Time // the passes of each key, the oldest first
	pruned time.Time
}

// maxKeys bounds a limiter's memory: some 30 MB if each has passed 60 times in
// the last minute.
const maxKeys = 20_000

func newLimiter(rate int) *limiter {
	return &limiter{rate: rate, window: time.Minute, passed: make(map[string][]time.Time)}
}

// A share is a key, and how many times the limiter's rate is its own.
type share struct {
	key   string
	times int
}

// one is the share of a key that counts alone.
func one(key string) share { return share{key, 1} }

// pass returns 0 if all shares may pass now, and counts that; else how long they
// must wait.
func (l *limiter) pass(shares ...share) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if wait := l.wait(shares...); wait > 0 || l.rate == 0 {
		return wait
	}
	now := time.Now()
	for _, s := range shares {
		_, known := l.passed[s.key]
		if !known && len(l.passed) >= maxKeys || now.Sub(l.pruned) >= l.window {
			l.prune(now)
		}
		times := l.passed[s.key]
		for len(times) > 0 && now.Sub(times[0]) >= l.window {
			times = times[1:]
		}
		l.passed[s.key] = append(times, now)
	}
	return 0
}

// wait returns how long the shares must wait until all may pass. l.mu is held.
func (l *limiter) wait(shares ...share) (wait time.Duration) {
	for _, s := range shares {
		times, most := l.passed[s.key], s.times*l.rate
		if most > 0 && len(times) >= most {
			wait = max(wait, time.Until(times[len(times)-most].Add(l.window)))
		}
	}
	return wait
}

// prune forgets who has not passed for a window; and an arbitrary tenth of the
// others where that leaves no room. l.mu is held.
func (l *limiter) prune(now time.Time) {
	maps.DeleteFunc(l.passed, func(_ string, times []time.Time) bool {
		return now.Sub(times[len(times)-1]) >= l.window
	})
	if len(l.passed) >= maxKeys {
		maps.DeleteFunc(l.passed, func(string, []time.Time) bool { return len(l.passed) > maxKeys*9/10 })
	}
	l.pruned = now
}

// full tells whether the shares may not pass now.
func (l *limiter) full(shares ...share) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wait(shares...) > 0
}

// shares returns what a client counts by, the narrowest first. For an IPv6
// address that is its /64, which is one customer's, and at ten times the rate
// its /48, which a customer or a provider has whole. Loopback has ten times the
// rate too: it is all who come through a proxy that does not say who they are.
func shares(who netip.Addr) []share {
	switch {
	case who.IsLoopback():
		return []share{{"loopback", 10}}
	case who.Is6():
		near, _ := who.Prefix(64)
		wide, _ := who.Prefix(48)
		return []share{{near.String(), 1}, {wide.String(), 10}}
	}
	return []share{{who.String(), 1}}
}

// client returns who asks. Behind loopback (nginx, an ngrok agent), a Unix
// socket and the trusted proxies it is the last hop of X-Forwarded-For that is
// none of these: loopback if there is no such hop, the zero Addr if a proxy
// calls it by anything but an address.
func client(r *http.Request, trusted []netip.Prefix) netip.Addr {
	addr := netip.IPv6Loopback() // the peer of a Unix socket has no address
	if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		addr = peer.Addr().Unmap().WithZone("")
	}
	for _, hop := range slices.Backward(strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")) {
		if hop = strings.TrimSpace(hop); hop == "" {
			continue // lists may have empty elements: RFC 9110, 5.6.1.2
		}
		isTrusted := slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
		if !isTrusted && !addr.IsLoopback() {
			break
		}
		withPort, err := netip.ParseAddrPort(hop)
		if addr = withPort.Addr(); err != nil {
			addr, err = netip.ParseAddr(hop)
		}
		if err != nil {
			return netip.Addr{}
		}
		addr = addr.Unmap().WithZone("")
	}
	return addr
}

const (
	maxWrong    = 10  // wrong signatures a minute from one client
	maxAllWrong = 600 // and from all
)

// A guessGuard makes guessing a secret slow: the Token, or somebody's digits. A
// guesser over the limit is told nothing, be the next guess right or wrong: else
// the one that works would be the answer. Right ones never count.
type guessGuard struct {
	wrong *limiter // by guesser
	once  *limiter // by guesser, to know who was wrong at all
	all   *limiter
}

// newGuessGuard lets each be wrong so many times in a window, and all together so many.
func newGuessGuard(each, all int, window time.Duration) *guessGuard {
	g := &guessGuard{wrong: newLimiter(each), once: newLimiter(1), all: newLimiter(all)}
	g.wrong.window, g.once.window, g.all.window = window, window, window
	return g
}

// isOver tells whether a guesser is over the limit: its own, or everybody's once
// it was wrong.
func (g *guessGuard) isOver(who ...share) bool {
	return g.wrong.full(who...) || g.once.full(who...) && g.all.full(one("all"))
}

// count notes that a guess was wrong.
func (g *guessGuard) count(who ...share) {
	g.wrong.pass(who...)
	g.once.pass(who...)
	g.all.pass(one("all"))
}

// shutsOut tells whether a client's signature is not even to be looked at. Many
// can be behind a proxy that does not say whom it forwards for, WeChat among them:
// there only the length of the Token stops who guesses.
func (g *guessGuard) shutsOut(who netip.Addr) bool {
	return !who.IsLoopback() && !who.IsPrivate() && g.isOver(shares(who)...)
}

// judge returns nil if a client's signature is right and to be believed, else
// errSignature or errGuessing.
func (g *guessGuard) judge(who netip.Addr, isRight bool) error {
	switch {
	case isRight && !g.shutsOut(who):
		return nil
	case g.isOver(shares(who)...):
		return errGuessing
	}
	g.count(shares(who)...)
	return errSignature
}

// A parked poll takes some 19 kB, so all of them 380 MB. The caps are beyond what
// honest people need: a ticket has one page, and over the caps a page polls each
// second instead.
const (
	maxParked          = 20_000
	maxParkedPerTicket = 8   // polls whose browser is gone may linger
	maxParkedPerClient = 200 // an office behind one address
	maxParkedURI       = 512 // bytes; a page's has a fifth
)

// A parking counts the polls that are parked.
type parking struct {
	mu      sync.Mutex // guards the fields below
	total   int
	tickets map[key]int
	clients map[string]int
}

// park finds a place for a poll of a ticket, which leave gives back. The poll
// loses its headers: parsed, 10 kB of tiny ones take half a megabyte. ok is false
// over a cap, and for a request with a body: until that is read, nobody notices
// that the browser has gone.
func (p *parking) park(r *http.Request, ticket key, who netip.Addr) (leave func(), ok bool) {
	s := shares(who)[0]
	if r.ContentLength != 0 || len(r.RequestURI) > maxParkedURI || !p.enter(ticket, s.key, s.times*maxParkedPerClient) {
		return nil, false
	}
	r.Header, r.Host = nil, ""
	return func() { p.leave(ticket, s.key) }, true
}

// enter takes a place; perClient is how many the client may have.
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

func (p *parking) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total
}
