package main

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
)

// loginURL returns what flow B's QR code says: it follows from the ticket's key.
func (c *wechat) loginURL(publicURL string, k key) string {
	return c.authorizeURL(publicURL+"/wechat/accessusercode", k.String())
}

// beginAuth begins flow B. It asks nothing of WeChat.
func (s *server) beginAuth(w http.ResponseWriter, r *http.Request) error {
	ticket := rand.Text()
	qr := s.wechat.loginURL(s.config.publicURL, digest(ticket))
	return s.begin(w, r, flowAuth, "", qrAnswer{Ticket: ticket, URL: qr})
}

// callback is where the phone comes back to from the authorize page of flow B.
func (s *server) callback(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	k, code := parseKey(query.Get("state")), query.Get("code")
	ticket, err := s.tickets.look(r.Context(), k)
	switch {
	case err != nil:
		return phoneFailed(w, r, "unavailable")
	case ticket.Flow != flowAuth: // or there is no such ticket
		return phoneFailed(w, r, "expired")
	}
	reason := "denied"
	if code != "" && code != "authdeny" {
		ticket, reason = s.redeem(r, k, code)
	}
	switch {
	case reason != "":
		s.metrics.count("wxscan_logins_total{flow=\"auth\",outcome=%q}", reason)
		return phoneFailed(w, r, reason)
	case ticket.Status == statusScanned:
		http.Redirect(w, r, s.confirmURL(k, ticket), http.StatusSeeOther)
		return nil
	case ticket.Status == statusDeclined:
		return phoneFailed(w, r, "declined")
	}
	return phoneSucceeded(w, r)
}

func phoneSucceeded(w http.ResponseWriter, r *http.Request) error {
	http.Redirect(w, r, "/static/html/loginsucceed.html", http.StatusSeeOther)
	return nil
}

// phoneFailed shows the phone why there is no login, in the words that
// loginfailed.html has for the reason.
func phoneFailed(w http.ResponseWriter, r *http.Request, reason string) error {
	http.Redirect(w, r, "/static/html/loginfailed.html?reason="+reason, http.StatusSeeOther)
	return nil
}

// redeem logs in the person who comes with a code. A code is exchanged once: a
// callback that is opened twice waits for the first and shares its outcome. Where
// there is no login, reason says why, for the phone's page.
func (s *server) redeem(r *http.Request, k key, code string) (ticket record, reason string) {
	ctx := r.Context()
	asker := client(r, s.config.trusted)
	if s.codeLimit.left(shares(asker)...) <= 0 {
		return record{}, string(outcomeUnavailable)
	}
	ticket, first, err := s.tickets.claim(ctx, k, code)
	switch _, tried := ticket.outcome(code); {
	case err != nil:
	case first:
		who, came := s.exchange(ctx, code)
		if came == outcomeExpired {
			s.codeLimit.pass(shares(asker)...)
		}
		ticket, err = s.tickets.settle(context.WithoutCancel(ctx), k, code, came, who)
	case !tried:
		return ticket, string(outcomeUsed)
	default:
		s.tickets.wait(ctx, k, requestTimeout, func(now *record) bool {
			came, _ := now.outcome(code)
			return came != outcomeNone
		})
		ticket, err = s.tickets.look(ctx, k)
	}
	switch came, _ := ticket.outcome(code); {
	case err != nil || came == outcomeNone:
		return ticket, string(outcomeUnavailable)
	case came != outcomeLogin:
		return ticket, string(came)
	}
	return ticket, ""
}

// exchange returns the person behind an OAuth code, or the outcome without one.
func (s *server) exchange(ctx context.Context, code string) (login, outcome) {
	who, err := s.wechat.exchangeCode(ctx, code)
	if err == nil {
		return who, outcomeLogin
	}
	if s.logLimit.pass(one("callback")) == 0 {
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
