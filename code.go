package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Wrong digits in ten minutes, of one sender and of all. Where ten people log in
// at a time, a guess meets one of them once in 100,000 times.
const maxWrongDigits, maxAllWrongDigits = 5, 300

// offers tells whether a way to log in is switched on.
func (c *config) offers(f flow) bool { return slices.Contains(c.flows, string(f)) }

// keepUnderNumber keeps r under a number of so many digits that is nobody else's now.
func (s *store) keepUnderNumber(ctx context.Context, kind string, digits int, r record) (string, error) {
	for range 4 { // if all are taken, so are too many for a guess to be hopeless
		var random [8]byte
		rand.Read(random[:])
		number := fmt.Sprintf("%020d", binary.BigEndian.Uint64(random[:]))[20-digits:]
		if _, isNew, err := s.keep(ctx, aside(kind, number), r); isNew || err != nil {
			return number, err
		}
	}
	return "", errTooManyTickets
}

// beginCode begins flow C. It asks nothing of WeChat.
func (s *server) beginCode(w http.ResponseWriter, r *http.Request) error {
	ticket := rand.Text()
	named := record{Names: digest(ticket), Ends: time.Now().Add(s.config.ttl)}
	code, err := s.tickets.keepUnderNumber(r.Context(), "digits", 6, named)
	if err != nil {
		return err
	}
	answer := qrAnswer{Ticket: ticket, Code: code}
	if s.config.account != "" {
		answer.QRURL = s.config.openBase + "/qr/code?username=" + url.QueryEscape(s.config.account)
	}
	return s.begin(w, r, flowCode, code, answer)
}

// takeMessage takes what somebody says to the account, and returns the answer.
func (s *server) takeMessage(ctx context.Context, push *event) (text string, err error) {
	said := strings.ToLower(strings.Join(strings.Fields(push.Content), ""))
	digits := strings.Map(func(c rune) rune {
		if '０' <= c && c <= '９' {
			return c - '０' + '0'
		}
		return c
	}, said)
	isText := push.MsgType == "text"
	asks := isText && slices.Contains([]string{"验证码", "登录", "login"}, said) ||
		push.MsgType == "event" && strings.EqualFold(push.Event, "CLICK") && push.EventKey == "USER_VERIFICATION"
	switch {
	case asks && s.config.apiToken != "":
		return s.sendCode(ctx, push)
	case !s.config.offers(flowCode):
		return "", nil
	case isText && len(digits) == 6 && strings.Trim(digits, "0123456789") == "":
		return s.takeDigits(ctx, push, digits)
	case push.MsgType == "event" && strings.EqualFold(push.Event, "subscribe"):
		return fmt.Sprintf("感谢关注。登录 %[1]s：请把登录页上的六位数字发送到这里。\n"+
			"To log in to %[1]s, send the six digits of the login page here.", s.config.site()), nil
	}
	return "", nil
}

// takeDigits logs in whoever sends the digits of a ticket. A message that comes
// again goes to the ticket that it came for first, whose digits they may be now.
func (s *server) takeDigits(ctx context.Context, push *event, digits string) (text string, err error) {
	sender := one(push.FromUserName)
	if s.wrongDigits.isOver(sender) {
		return "", nil
	}
	named, err := s.tickets.look(ctx, aside("digits", digits))
	if err != nil {
		return "", err
	}
	message := record{Names: named.Names, Ends: time.Now().Add(s.config.pushLife())}
	message, isNew, err := s.tickets.keep(ctx, push.id(), message)
	if err != nil {
		return "", err
	}
	who := login{OpenID: push.FromUserName}
	ticket, first, err := s.tickets.complete(ctx, message.Names, flowCode, who)
	switch {
	case err != nil:
		return "", err
	case first, ticket.Flow == flowCode && ticket.Login == who:
		return s.loginText(message.Names, ticket), nil
	case isNew:
		s.wrongDigits.count(sender)
	}
	text = "数字不对，或已过期。请发送登录页上的六位数字。\n" +
		"These digits are wrong, or old: send those of the login page."
	if s.wrongDigits.isOver(sender) {
		text = "数字不对，或已过期。请十分钟后再试。\n" +
			"These digits are wrong, or old. Try again in ten minutes."
	}
	return text, nil
}
