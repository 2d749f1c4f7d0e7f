package main

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"slices"
	"time"
)

const (
	// maxCodes is how many OAuth codes a ticket remembers. Each costs a call of
	// WeChat's, and whoever photographs a QR code can bring more.
	maxCodes = 20
	// claimTTL is how long an OAuth code can be on its way to WeChat and back. A
	// replica that was killed meanwhile keeps nobody from trying again.
	claimTTL = 10 * time.Second
)

// An attempt is an OAuth code that a phone has brought.
type attempt struct {
	Code    key       // its digest
	Outcome outcome   // outcomeNone while it is being exchanged
	Since   time.Time // when that began
}

// lost tells whether nobody exchanges the code any more.
func (a attempt) lost() bool { return a.Outcome == outcomeNone && time.Since(a.Since) > claimTTL }

// An outcome is what came of an OAuth code, or of the phone's decision. Where it is no
// login, loginfailed.html has words for it.
type outcome string

const (
	outcomeNone        outcome = "" // none yet: the code is being exchanged
	outcomeLogin       outcome = "login"
	outcomeUsed        outcome = "used"
	outcomeExpired     outcome = "expired" // too old, or made up
	outcomeSnapshot    outcome = "snapshot"
	outcomeUnavailable outcome = "unavailable"
	outcomeDenied      outcome = "denied"   // on WeChat's page
	outcomeDeclined    outcome = "declined" // on ours
	outcomeNumber      outcome = "number"   // of the three, a wrong one
)

// outcome returns what came of an OAuth code: outcomeExpired for one that is not known,
// as are those that settle has forgotten, and all of a ticket that has ended.
func (r *record) outcome(code string) (came outcome, known bool) {
	for _, a := range r.Codes {
		if a.Code == digest(code) {
			return a.Outcome, true
		}
	}
	return outcomeExpired, false
}

// claim notes that an OAuth code is to be exchanged for a login. It is true for
// the one call that is to do so, over all replicas, and to settle the code within
// claimTTL. Otherwise the ticket knows the code, or takes none any more.
func (s *store) claim(ctx context.Context, k key, code string) (record, bool, error) {
	return s.change(ctx, k, func(r record) (record, bool) {
		r.Codes = slices.DeleteFunc(slices.Clone(r.Codes), attempt.lost)
		_, known := r.outcome(code)
		ok := !known && r.Status == statusPending && r.Flow == flowAuth && len(r.Codes) < maxCodes
		r.Codes = append(r.Codes, attempt{Code: digest(code), Since: time.Now()})
		return r, ok
	})
}

// settle notes what came of a code that was claimed; with outcomeLogin it logs
// who in, unless somebody was first. A code that WeChat calls invalid is
// forgotten: whoever makes codes up must not use up the ticket.
func (s *store) settle(ctx context.Context, k key, code string, came outcome, who login) (record, error) {
	r, _, err := s.change(ctx, k, func(r record) (record, bool) {
		settled := attempt{Code: digest(code), Outcome: came}
		switch {
		case r.Status == statusExpired:
			return r, false
		case came == outcomeLogin && r.Status == statusPending:
			r = s.logIn(r, who)
		case came == outcomeLogin:
			settled.Outcome = outcomeUsed
		}
		r.Codes = slices.DeleteFunc(slices.Clone(r.Codes), func(a attempt) bool { return a.Code == settled.Code })
		if came != outcomeExpired {
			r.Codes = append(r.Codes, settled)
		}
		return r, true
	})
	return r, err
}

// loginURL returns what flow B's QR code says: it follows from the ticket's key.
func (c *wechat) loginURL(publicURL string, k key) string {
	return c.authorizeURL(publicURL+"/wechat/accessusercode", k.String())
}

// beginAuth begins flow B. It asks nothing of WeChat.
func (s *server) beginAuth(w http.ResponseWriter, r *http.Request) error {
	ticket := rand.Text()
	qr := s.wechat.loginURL(s.config.publicURL, digest(ticket))
	return s.begin(w, r, flowAuth, "", qrAnswer{Ticket: ticket, QRURL: s.pictureURL(ticket), URL: qr})
}

// callback is where the phone comes back to from the authorize page of flow B.
func (s *server) callback(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	k, code := parseKey(query.Get("state")), query.Get("code")
	ticket, err := s.tickets.look(r.Context(), k)
	switch {
	case err != nil:
		return phoneFailed(w, r, outcomeUnavailable)
	case ticket.Flow != flowAuth: // or there is no such ticket
		return phoneFailed(w, r, outcomeExpired)
	}
	came := outcomeDenied
	if code != "" && code != "authdeny" {
		ticket, came = s.redeem(r, k, code)
	}
	switch {
	case came != outcomeLogin:
		s.metrics.count("wxscan_logins_total{flow=\"auth\",outcome=%q}", came)
		return phoneFailed(w, r, came)
	case ticket.Status == statusScanned:
		http.Redirect(w, r, s.confirmURL(k, ticket), http.StatusSeeOther)
		return nil
	case ticket.Status == statusDeclined:
		return phoneFailed(w, r, outcomeDeclined)
	}
	return phoneSucceeded(w, r)
}

// redeem logs in the person who comes with a code. A code is exchanged once: a
// callback that is opened twice waits for the first and shares its outcome.
func (s *server) redeem(r *http.Request, k key, code string) (record, outcome) {
	ctx, asker := r.Context(), shares(client(r, s.config.trusted))
	if s.badOAuthCodes.left(asker...) <= 0 {
		return record{}, outcomeUnavailable
	}
	ticket, isOurs, err := s.tickets.claim(ctx, k, code)
	_, isKnown := ticket.outcome(code)
	switch {
	case err != nil:
		return ticket, outcomeUnavailable
	case isOurs:
		who, came := s.exchange(ctx, code)
		if came == outcomeExpired {
			s.badOAuthCodes.pass(asker...)
		}
		ticket, err = s.tickets.settle(ctx, k, code, came, who)
	case !isKnown: // somebody has logged in already, or too many codes are under way
		return ticket, outcomeUsed
	default:
		s.tickets.wait(ctx, k, requestTimeout, func(now *record) bool {
			came, _ := now.outcome(code)
			return came != outcomeNone
		})
		ticket, err = s.tickets.look(ctx, k)
	}
	came, _ := ticket.outcome(code)
	if err != nil || came == outcomeNone {
		came = outcomeUnavailable
	}
	return ticket, came
}

// exchange returns the person behind an OAuth code, or the outcome without one.
func (s *server) exchange(ctx context.Context, code string) (login, outcome) {
	who, err := s.wechat.exchangeCode(ctx, code)
	if err == nil {
		return who, outcomeLogin
	}
	if s.logLimit.allows("callback") {
		s.log.Warn("no login by web authorization", "err", err, hint(err))
	}
	switch {
	case errors.Is(err, errSnapshot):
		return login{}, outcomeSnapshot
	case kindOf(err) == kindUsed:
		return login{}, outcomeUsed
	case kindOf(err) == kindInvalid:
		return login{}, outcomeExpired
	}
	return login{}, outcomeUnavailable
}
