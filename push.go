package main

import (
	"sync"
	"time"
)

const (
	maxWrong    = 10             // wrong signatures in a row from one client
	maxAllWrong = 600            // wrong signatures in a row from all
	provenFor   = 24 * time.Hour // since the client's last right signature

	untold = "untold" // the client behind a local proxy that names none
)

// A guessGuard makes guessing the Token slow. A client whose signatures are wrong
// is shut out until a minute has passed: after maxWrong of them or, while there
// are maxAllWrong from all, after one. To a client that is shut out a right
// signature is as good as a wrong one, else the one that works would be the answer.
//
// WeChat is never shut out, for its signatures are right; and not for what others
// do behind a proxy that does not say whom it forwards for: a client that has
// lately sent a right one is proven, and its right ones always count. So do those
// of untold. In these two cases, only the length of the Token stops who guesses.
type guessGuard struct {
	mu     sync.Mutex       // guards wrong and proven
	wrong  memory[int]      // by client, and of all by ""
	proven memory[struct{}] // by client
}

func newGuessGuard() *guessGuard {
	return &guessGuard{wrong: newMemory[int](maxPushes), proven: newMemory[struct{}](maxKeys)}
}

// isOut tells whether a client is shut out.
func (g *guessGuard) isOut(client string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.isProven(client) && g.tooMany(client)
}

// isProven needs the lock.
func (g *guessGuard) isProven(client string) bool {
	_, proven := g.proven.get(client)
	return proven || client == untold
}

// tooMany needs the lock.
func (g *guessGuard) tooMany(client string) bool {
	wrong, _ := g.wrong.get(client)
	all, _ := g.wrong.get("")
	return wrong >= maxWrong || wrong > 0 && all >= maxAllWrong
}

// judge counts a client's signature, and returns nil if it is to be believed,
// else errSignature or errGuessing.
func (g *guessGuard) judge(client string, isRight bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch tooMany := g.tooMany(client); {
	case isRight && (!tooMany || g.isProven(client)):
		g.proven.put(client, struct{}{}, provenFor)
		return nil
	case tooMany:
		return errGuessing
	}
	for _, who := range []string{client, ""} {
		wrong, _ := g.wrong.get(who)
		g.wrong.put(who, wrong+1, time.Minute)
	}
	return errSignature
}
