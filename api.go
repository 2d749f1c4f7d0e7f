package main

import (
	"context"
	"crypto/subtle"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// This is the protocol of wechat-server, for the clients that it has (one-api,
// new-api): people get a code from the account, and type it into the client's page.

const (
	codeLife         = 3 * time.Minute
	maxAPICodesSent  = 5  // a minute, to one sender
	maxWrongAPICodes = 30 // wrong codes a minute, of all clients: where ten are live, one is met in 7 months

	// codeQRLife is WeChat's life of the QR code that answers with a code. It is
	// shown for half of that.
	codeQRLife = 24 * time.Hour
)

// codeScene is the scene of that QR code.
var codeScene = aside("scene", "code")

// sendCode answers with a code that its reader types into a client of
// wechat-server's. A sender has one; a message that comes again has the same. It stays
// silent for a message whose code has ended, and for a sender who asks too often.
func (s *server) sendCode(ctx context.Context, push *event) (text string, err error) {
	sender, message, now := aside("sender", push.FromUserName), push.id(), time.Now()
	live, err := s.tickets.look(ctx, sender)
	if err != nil {
		return "", err
	}
	if live.Names != message {
		earlier, err := s.tickets.look(ctx, message)
		if err != nil || earlier.Status != statusExpired || !s.apiCodesSent.allows(push.FromUserName) {
			return "", err
		}
		code, err := s.tickets.keepUnderNumber(ctx, "code", 8, record{Names: sender, Ends: now.Add(codeLife)})
		if err != nil {
			return "", err
		}
		next := record{Flow: flowAPI, Shown: code, Status: statusPending, Names: message,
			Login: login{OpenID: push.FromUserName}, Since: now, Ends: now.Add(codeLife)}
		live, _, err = s.tickets.change(ctx, sender, func(r record) (record, bool) { return next, r.Names != message })
		if err != nil {
			return "", err
		}
		if _, _, err = s.tickets.keep(ctx, message, record{Ends: now.Add(s.config.pushLife())}); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%s\n登录 %[2]s 的验证码，三分钟内有效。请勿告诉他人。\n"+
		"The code to log in to %[2]s, for three minutes. Tell it to nobody.", live.Shown, s.config.site()), nil
}

// redeemAPICode returns whose code it is, once; else "".
func (s *store) redeemAPICode(ctx context.Context, code string) (openID string, err error) {
	named, err := s.look(ctx, aside("code", code))
	if err != nil {
		return "", err
	}
	r, won, err := s.change(ctx, named.Names, func(r record) (record, bool) {
		return r.become(statusDone, r.left()), r.Shown == code && r.Status == statusPending
	})
	if !won {
		return "", err
	}
	return r.Login.OpenID, nil
}

// tellUser tells a client of wechat-server's who has a code. Such clients look at
// no status, and show people the message.
func (s *server) tellUser(w http.ResponseWriter, r *http.Request) error {
	var answer struct {
		Success bool   `json:"success"`
		Message string `json:"message"`
		Data    string `json:"data"` // the openid
	}
	code, token := r.URL.Query().Get("code"), strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	switch {
	case subtle.ConstantTimeCompare([]byte(token), []byte(s.config.apiToken)) != 1:
		answer.Message = "无权进行此操作，未登录或 token 无效"
	case code == "":
		answer.Message = "无效的参数"
	case s.wrongAPICodes.left(one("")) <= 0:
		answer.Message = "验证码错误次数过多，请一分钟后再试"
	default:
		var err error
		if answer.Data, err = s.tickets.redeemAPICode(r.Context(), code); err != nil {
			answer.Message = "暂时无法验证，请稍后再试"
		} else if answer.Success = true; answer.Data == "" {
			s.wrongAPICodes.pass(one(""))
		}
	}
	return writeJSON(w, http.StatusOK, answer)
}

// drawCodeQR shows the QR code whose scanner is answered with a code: as the
// account's picture of a client of wechat-server's, on any site.
func (s *server) drawCodeQR(w http.ResponseWriter, r *http.Request) error {
	qr, err := s.tickets.look(r.Context(), codeScene)
	if err == nil && qr.Status == statusExpired {
		qr = record{Ends: time.Now().Add(codeQRLife / 2)}
		if _, qr.Shown, err = s.wechat.createQR(r.Context(), codeScene.String(), codeQRLife); err == nil {
			qr, _, err = s.tickets.keep(r.Context(), codeScene, qr)
		}
	}
	if err != nil {
		return err
	}
	picture, err := qrPNG(qr.Shown)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "public, max-age=3600")
	return write(w, http.StatusOK, "image/png", picture)
}
