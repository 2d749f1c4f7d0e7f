package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// forwardedHeader says "missing" in the answer to a signed URL check that came
// from loopback without X-Forwarded-For. It is for wxscan check.
const forwardedHeader = "X-Wxscan-Forwarded-For"

var (
	errSignature = errors.New("bad signature")
	errTooLarge  = errors.New("body too large")
	errPush      = errors.New("not a push")
	errNotTaken  = errors.New("push not taken")
	errGuessing  = errors.New("too many bad signatures")
)

// An event is a push of WeChat's (接收事件推送), as far as we use it.
type event struct {
	XMLName      xml.Name `xml:"xml"`
	ToUserName   string   // the account
	FromUserName string   // the openid
	MsgType      string
	Event        string
	EventKey     string
	Ticket       string
	Content      string // of a text
	CreateTime   string
	MsgID        string `xml:"MsgId"` // of a message; an event has none
	Encrypt      string // in safe mode (消息加解密), the one field that counts
}

// scan tells whether the event is the scan of a parametric QR code, by a
// follower or by somebody who has followed the account with it.
func (e *event) scan() bool {
	followed := strings.EqualFold(e.Event, "subscribe") && strings.HasPrefix(e.EventKey, "qrscene_")
	return e.MsgType == "event" && e.FromUserName != "" && (followed || strings.EqualFold(e.Event, "SCAN"))
}

// follow tells whether somebody has followed the account, by no QR code of ours.
func (e *event) follow() bool {
	return e.MsgType == "event" && strings.EqualFold(e.Event, "subscribe") && !e.scan()
}

// id names what was sent, and stays the same when WeChat pushes it again.
func (e *event) id() key { return aside("push", e.FromUserName+" "+cmp.Or(e.MsgID, e.CreateTime)) }

// scene returns the scene of the QR code that was scanned: with us, a ticket's
// key in hex.
func (e *event) scene() string { return strings.TrimPrefix(e.EventKey, "qrscene_") }

// decodeXML reads one document into v, whose XMLName says what its root must be.
func decodeXML(data []byte, v any) error {
	d := xml.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(v); err != nil {
		return err
	}
	if len(bytes.TrimSpace(data[d.InputOffset():])) > 0 {
		return errors.New("something follows the root element")
	}
	return nil
}

// verifyURL answers WeChat's check of the interface URL (验证消息的确来自微信服务器).
func (s *server) verifyURL(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	isRight := verify(query.Get("signature"), s.config.token, query.Get("timestamp"), query.Get("nonce"))
	if err := s.guesses.judge(client(r, s.config.trusted), isRight); err != nil {
		return err
	}
	if r.Header.Get("X-Forwarded-For") == "" && client(r, s.config.trusted).IsLoopback() {
		w.Header().Set(forwardedHeader, "missing")
	}
	return write(w, http.StatusOK, plainText, []byte(query.Get("echostr")))
}

// receive takes a push from WeChat. A push that cannot be taken now is answered
// with 500, so that WeChat sends it again.
func (s *server) receive(w http.ResponseWriter, r *http.Request) error {
	err := s.takePush(w, r)
	if errors.Is(err, errStoreUnavailable) {
		return fmt.Errorf("%w: %w", errNotTaken, err)
	}
	return err
}

// takePush takes a push from WeChat. WeChat resends what is not answered within
// 5 seconds, so even a push we have no use for is answered with success.
func (s *server) takePush(w http.ResponseWriter, r *http.Request) error {
	push, err := s.readPush(w, r)
	if err != nil {
		return err
	}
	var text string
	switch {
	case push.FromUserName == "":
	case push.scan():
		text, err = s.takeScan(r.Context(), push)
	default:
		text, err = s.takeMessage(r.Context(), push)
	}
	if err != nil {
		return err
	}
	if text == "" {
		return write(w, http.StatusOK, plainText, []byte("success"))
	}
	reply, err := s.passiveReply(push, text)
	if err != nil {
		return err
	}
	return write(w, http.StatusOK, "text/xml; charset=utf-8", reply)
}

// takeScan takes the scan of a parametric QR code. Only who has just logged in,
// or has yet to confirm it, is told anything.
func (s *server) takeScan(ctx context.Context, push *event) (text string, err error) {
	k, who := parseKey(push.scene()), login{OpenID: push.FromUserName}
	if k == codeScene && s.config.apiToken != "" {
		return s.sendCode(ctx, push)
	}
	ticket, first, err := s.tickets.complete(ctx, k, flowScan, who)
	if err == nil && ticket.Status == statusExpired { // no scene of ours: perhaps a push made by hand, with our ticket
		k = digest(push.Ticket)
		ticket, first, err = s.tickets.complete(ctx, k, flowScan, who)
	}
	again := ticket.Status == statusScanned && ticket.Flow == flowScan && ticket.Login == who
	if err != nil || !first && !again {
		return "", err
	}
	return s.loginText(k, ticket), nil
}

// readPush returns the event of a push that is really from WeChat, else
// errSignature, errGuessing, errTooLarge or errPush. Our settings decide whether
// it must be sealed, never the request; of a sealed push, only the sealed part
// counts. A push can come again: its ticket is logged in once.
func (s *server) readPush(w http.ResponseWriter, r *http.Request) (*event, error) {
	query := r.URL.Query()
	signed := []string{s.config.token, query.Get("timestamp"), query.Get("nonce")}
	sign, key, guesser := query.Get("signature"), s.config.aesKey, client(r, s.config.trusted)
	isRight := verify(sign, signed...)
	switch {
	case s.guesses.shutsOut(guesser):
		return nil, errGuessing
	case key == nil, query.Has("signature") && !isRight: // WeChat sends it in safe mode too, and it spares us the XML
		if err := s.guesses.judge(guesser, isRight); err != nil {
			return nil, err
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, errTooLarge
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errPush, err)
	}
	if key != nil {
		var envelope event
		sign = query.Get("msg_signature")
		isRight = decodeXML(body, &envelope) == nil && verify(sign, append(signed, envelope.Encrypt)...)
		if err := s.guesses.judge(guesser, isRight); err != nil {
			return nil, err
		}
		if body, err = key.open(envelope.Encrypt, s.config.appID); err != nil {
			return nil, fmt.Errorf("%w: %w", errSignature, err)
		}
	}
	if seconds, err := strconv.ParseInt(query.Get("timestamp"), 10, 64); err != nil || !s.pushes.fresh(seconds) {
		return nil, fmt.Errorf("%w: its time is too far from ours: a replay, or clock skew? (PUSH_MAX_SKEW is %v)",
			errSignature, s.config.maxSkew)
	}
	push := new(event)
	if err := decodeXML(body, push); err != nil {
		return nil, fmt.Errorf("%w: %w", errPush, err)
	}
	admitted, err := s.pushes.admit(r.Context(), sign, body)
	if err == nil && !admitted {
		err = fmt.Errorf("%w: it came before, with another body", errSignature)
	}
	return push, err
}

// A pushGuard knows the pushes that have come lately. WeChat's plain signature
// does not cover the body, so whoever has seen one could sign anything with it.
type pushGuard struct {
	maxSkew time.Duration // how old or early a push may be; 0 does not look
	redis   *redis        // keeps what all replicas have seen; nil: the fields below do

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

// admit tells whether a signature carries this body alone, as far as we know.
// When the memory is full, the oldest push is forgotten.
func (g *pushGuard) admit(ctx context.Context, signature string, body []byte) (bool, error) {
	sum, now := sha256.Sum256(body), time.Now()
	if g.redis != nil {
		earlier, err := g.redis.first(ctx, "push:"+digest(signature).String(), sum[:], g.life())
		return earlier == nil || bytes.Equal(earlier, sum[:]), err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.order) > 0 && !now.Before(g.seen[g.order[0]].due) {
		g.forget()
	}
	if earlier, known := g.seen[signature]; known {
		return earlier.body == sum, nil
	}
	if len(g.order) == maxPushes {
		g.forget()
	}
	g.seen[signature] = pushed{sum, now.Add(g.life())}
	g.order = append(g.order, signature)
	return true, nil
}

// life is how long a signature can be fresh: from maxSkew before its time to
// maxSkew after it, both included.
func (g *pushGuard) life() time.Duration {
	if g.maxSkew == 0 {
		return time.Hour
	}
	return 2*g.maxSkew + time.Second
}

// forget forgets the oldest. It needs the lock.
func (g *pushGuard) forget() {
	delete(g.seen, g.order[0])
	g.order = g.order[1:]
}

// cdata is a string that WeChat wants in a CDATA section.
type cdata struct {
	Text string `xml:",cdata"`
}

// textReply returns the passive reply (被动回复用户消息) that shows text to the
// sender of an event.
func textReply(to *event, now time.Time, text string) ([]byte, error) {
	return xml.Marshal(struct {
		XMLName                  xml.Name `xml:"xml"`
		ToUserName, FromUserName cdata
		CreateTime               int64 // Unix seconds
		MsgType, Content         cdata
	}{
		ToUserName: cdata{to.FromUserName}, FromUserName: cdata{to.ToUserName},
		CreateTime: now.Unix(), MsgType: cdata{"text"}, Content: cdata{text},
	})
}

// beijing is the time of WeChat's users, whatever the server's.
var beijing = time.FixedZone("UTC+8", 8*60*60)

// loginText tells who has logged in, or is to confirm it, where the ticket with
// key k stands.
func (s *server) loginText(k key, ticket record) string {
	confirm := ""
	text := "您已登录 %[1]s（%[2]s）。如非本人操作，请立即告知该网站，勿扫他人发来的二维码。\n" +
		"You have logged in to %[1]s (%[2]s Beijing time). " +
		"If this was not you, tell the site, and scan no codes that others send you."
	if ticket.Status == statusScanned {
		text = "有人请求以您的身份登录 %[1]s（%[2]s）。<a href=\"%[3]s\">查看并确认</a>。如非本人操作，请勿理会。\n" +
			"Somebody asks to log in to %[1]s as you (%[2]s Beijing time). " +
			"<a href=\"%[3]s\">Look and confirm</a>; if it is not you, do nothing."
		confirm = s.confirmURL(k, ticket)
	}
	return fmt.Sprintf(text, site(s.config.publicURL).Host, time.Now().In(beijing).Format("15:04"), confirm)
}

// passiveReply returns what tells the sender of a push a text; sealed, if there
// is a key.
func (s *server) passiveReply(to *event, text string) ([]byte, error) {
	now := time.Now()
	reply, err := textReply(to, now, text)
	if err != nil || s.config.aesKey == nil {
		return reply, err
	}
	timestamp, nonce, random := strconv.FormatInt(now.Unix(), 10), rand.Text(), make([]byte, 16)
	rand.Read(random)
	encrypt := s.config.aesKey.seal(random, reply, s.config.appID)
	return fmt.Appendf(nil, "<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature>"+
		"<TimeStamp>%s</TimeStamp><Nonce><![CDATA[%s]]></Nonce></xml>",
		encrypt, signature(s.config.token, timestamp, nonce, encrypt), timestamp, nonce), nil
}

// signedQuery returns a fresh query of WeChat's, signed.
func (c *config) signedQuery() url.Values {
	timestamp, nonce := fmt.Sprint(time.Now().Unix()), rand.Text()
	return url.Values{"signature": {signature(c.token, timestamp, nonce)}, "timestamp": {timestamp}, "nonce": {nonce}}
}

// signedPush returns an event as WeChat pushes it: its query and its body.
func (c *config) signedPush(openID, event, eventKey, ticket string) (url.Values, []byte, error) {
	return c.signedBody(struct {
		XMLName                          xml.Name `xml:"xml"`
		ToUserName, FromUserName         cdata
		CreateTime                       int64
		MsgType, Event, EventKey, Ticket cdata
	}{
		ToUserName: cdata{"gh_0123456789ab"}, FromUserName: cdata{openID}, CreateTime: time.Now().Unix(),
		MsgType: cdata{"event"}, Event: cdata{event}, EventKey: cdata{eventKey}, Ticket: cdata{ticket},
	})
}

// signedText returns a text message as WeChat pushes it: its query and its body.
func (c *config) signedText(openID, content string) (url.Values, []byte, error) {
	return c.signedBody(struct {
		XMLName                  xml.Name `xml:"xml"`
		ToUserName, FromUserName cdata
		CreateTime               int64
		MsgType, Content         cdata
		MsgID                    int64 `xml:"MsgId"`
	}{
		ToUserName: cdata{"gh_0123456789ab"}, FromUserName: cdata{openID}, CreateTime: time.Now().Unix(),
		MsgType: cdata{"text"}, Content: cdata{content}, MsgID: mathrand.Int64(),
	})
}

// signedBody returns a push's query and body, signed, and sealed if there is a key.
func (c *config) signedBody(push any) (url.Values, []byte, error) {
	body, err := xml.Marshal(push)
	query := c.signedQuery()
	if c.aesKey != nil {
		encrypt := c.aesKey.seal([]byte(rand.Text()[:16]), body, c.appID)
		query.Set("encrypt_type", "aes")
		query.Set("msg_signature", signature(c.token, query.Get("timestamp"), query.Get("nonce"), encrypt))
		body = fmt.Appendf(nil, "<xml><ToUserName>gh_0123456789ab</ToUserName><Encrypt>%s</Encrypt></xml>", encrypt)
	}
	return query, body, err
}

// pushTimeout is WeChat's patience with us.
const pushTimeout = 5 * time.Second

// sendAsWeChat makes a request as WeChat does: with 5 seconds of patience, and
// with a User-Agent by which some tunnels take it for a browser. The error is
// free of the URL.
func sendAsWeChat(ctx context.Context, client *http.Client, method, target string, body []byte) (
	*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	var resp *http.Response
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err == nil {
		req.Header.Set("User-Agent", "Mozilla/4.0")
		resp, err = client.Do(req)
	}
	if err != nil {
		return nil, nil, withoutURL(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return resp, answer, err
}
