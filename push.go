package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
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
	CreateTime   string
	MsgType      string
	Event        string
	EventKey     string
	Ticket       string
	Content      string // of a text
	MsgID        string `xml:"MsgId"` // of a message; an event has none
	Encrypt      string // in safe mode (消息加解密), the one field that counts
}

// scan tells whether the event is the scan of a parametric QR code, by a
// follower or by somebody who has followed the account with it.
func (e *event) scan() bool {
	followed := strings.EqualFold(e.Event, "subscribe") && strings.HasPrefix(e.EventKey, "qrscene_")
	return e.MsgType == "event" && e.FromUserName != "" && (followed || strings.EqualFold(e.Event, "SCAN"))
}

// id names what was sent, and stays the same when WeChat pushes it again.
func (e *event) id() key { return aside("push", e.FromUserName+" "+cmp.Or(e.MsgID, e.CreateTime)) }

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
	query, asker := r.URL.Query(), client(r, s.config.trusted)
	isRight := verify(query.Get("signature"), s.config.token, query.Get("timestamp"), query.Get("nonce"))
	if err := s.badSignatures.judge(asker, isRight); err != nil {
		return err
	}
	if r.Header.Get("X-Forwarded-For") == "" && asker.IsLoopback() {
		w.Header().Set(forwardedHeader, "missing")
	}
	return write(w, http.StatusOK, plainText, []byte(query.Get("echostr")))
}

// receive takes a push from WeChat. WeChat resends what is not answered within
// 5 seconds, so even a push we have no use for is answered with success. One that
// cannot be taken now is answered with 500, so that WeChat sends it again.
func (s *server) receive(w http.ResponseWriter, r *http.Request) error {
	push, err := s.readPush(w, r)
	var text string
	switch {
	case err != nil, push.FromUserName == "":
	case push.scan():
		text, err = s.takeScan(r.Context(), push)
	default:
		text, err = s.takeMessage(r.Context(), push)
	}
	switch {
	case errors.Is(err, errStoreUnavailable):
		return fmt.Errorf("%w: %w", errNotTaken, err)
	case err != nil:
		return err
	case text == "":
		return write(w, http.StatusOK, plainText, []byte("success"))
	}
	reply, err := s.config.passiveReply(push, text)
	if err != nil {
		return err
	}
	return write(w, http.StatusOK, "text/xml; charset=utf-8", reply)
}

// takeScan takes the scan of a parametric QR code. Only whoever has just logged in,
// or has yet to confirm it, gets a reply.
func (s *server) takeScan(ctx context.Context, push *event) (text string, err error) {
	k, who := parseKey(strings.TrimPrefix(push.EventKey, "qrscene_")), login{OpenID: push.FromUserName}
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
	sign, guesser, isSafeMode := query.Get("signature"), client(r, s.config.trusted), s.config.aesKey != nil
	isRight := verify(sign, signed...)
	// WeChat sends this signature in safe mode too: a wrong one spares us the body.
	if !isSafeMode || query.Has("signature") && !isRight || s.badSignatures.shutsOut(guesser) {
		if err := s.badSignatures.judge(guesser, isRight); err != nil {
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
	if isSafeMode {
		var envelope event
		sign = query.Get("msg_signature")
		isRight = decodeXML(body, &envelope) == nil && verify(sign, append(signed, envelope.Encrypt)...)
		if err := s.badSignatures.judge(guesser, isRight); err != nil {
			return nil, err
		}
		if body, err = s.config.aesKey.open(envelope.Encrypt, s.config.appID); err != nil {
			return nil, fmt.Errorf("%w: %w", errSignature, err)
		}
	}
	if !s.config.isFresh(query.Get("timestamp")) {
		return nil, fmt.Errorf("%w: its time is too far from ours: a replay, or clock skew? (PUSH_MAX_SKEW is %v)",
			errSignature, s.config.maxSkew)
	}
	push := new(event)
	if err := decodeXML(body, push); err != nil {
		return nil, fmt.Errorf("%w: %w", errPush, err)
	}
	return push, s.admit(r.Context(), sign, body)
}

// maxPushes is how many signatures are remembered in memory, in some 40 MB.
const maxPushes = 100_000

// admit returns errSignature if a signature came before with another body. WeChat's
// plain signature does not cover the body, so whoever has seen one could sign anything
// with it. Over maxPushes, new ones are not remembered.
func (s *server) admit(ctx context.Context, signature string, body []byte) error {
	push := record{Names: digest(string(body)), Ends: time.Now().Add(s.config.pushLife())}
	first, _, err := s.pushes.keep(ctx, aside("signature", signature), push)
	switch {
	case errors.Is(err, errTooManyTickets):
		return nil
	case err == nil && first.Names != push.Names:
		return fmt.Errorf("%w: it came before, with another body", errSignature)
	}
	return err
}

// isFresh tells whether a push's timestamp, in Unix seconds, is within PUSH_MAX_SKEW.
func (c *config) isFresh(timestamp string) bool {
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	return err == nil && (c.maxSkew == 0 || time.Since(time.Unix(seconds, 0)).Abs() <= c.maxSkew)
}

// pushLife is how long a signature can be fresh: from PUSH_MAX_SKEW before its time to
// PUSH_MAX_SKEW after it, both included.
func (c *config) pushLife() time.Duration {
	if c.maxSkew == 0 {
		return time.Hour
	}
	return 2*c.maxSkew + time.Second
}

// A cdata is a text that WeChat puts, and wants, into a CDATA section.
type cdata string

func (c cdata) MarshalXML(e *xml.Encoder, start xml.StartElement) error {
	return e.EncodeElement(struct {
		Text string `xml:",cdata"`
	}{string(c)}, start)
}

// A message goes to the account, or from it.
type message struct {
	XMLName                  xml.Name `xml:"xml"`
	ToUserName, FromUserName cdata
	CreateTime               string // Unix seconds
	MsgType                  cdata
	Event, EventKey, Ticket  cdata  `xml:",omitempty"`
	Content                  cdata  `xml:",omitempty"`
	MsgID                    string `xml:"MsgId,omitempty"`
}

// beijing is the time of WeChat's users, whatever the server's.
var beijing = time.FixedZone("UTC+8", 8*60*60)

// loginText tells whoever has logged in, or is to confirm it, where the ticket with
// key k stands. It names the host, which nobody can choose as they can SITE_NAME.
func (s *server) loginText(k key, ticket record) string {
	confirm := ""
	text := "您已登录 %[1]s（%[2]s）。" +
		"如非本人操作，请立即告知该网站，勿扫他人发来的二维码。\n" +
		"You have logged in to %[1]s (%[2]s Beijing time). " +
		"If this was not you, tell the site, and scan no codes that others send you."
	if ticket.Status == statusScanned {
		text = "有人请求以您的身份登录 %[1]s（%[2]s）。" +
			"<a href=\"%[3]s\">查看并确认</a>。如非本人操作，请勿理会。\n" +
			"Somebody asks to log in to %[1]s as you (%[2]s Beijing time). " +
			"<a href=\"%[3]s\">Look and confirm</a>; if it is not you, do nothing."
		confirm = s.confirmURL(k, ticket)
	}
	return fmt.Sprintf(text, originOf(s.config.publicURL).Host, time.Now().In(beijing).Format("15:04"), confirm)
}

// passiveReply returns the answer to a push (被动回复用户消息) that shows its sender a
// text; sealed, if there is a key.
func (c *config) passiveReply(to *event, text string) ([]byte, error) {
	timestamp, nonce := unixNow(), rand.Text()
	reply, err := xml.Marshal(message{ToUserName: cdata(to.FromUserName), FromUserName: cdata(to.ToUserName),
		CreateTime: timestamp, MsgType: "text", Content: cdata(text)})
	if err != nil || c.aesKey == nil {
		return reply, err
	}
	encrypt := c.aesKey.seal([]byte(rand.Text()[:16]), reply, c.appID)
	return fmt.Appendf(nil, "<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature>"+
		"<TimeStamp>%s</TimeStamp><Nonce><![CDATA[%s]]></Nonce></xml>",
		encrypt, signature(c.token, timestamp, nonce, encrypt), timestamp, nonce), nil
}

func unixNow() string { return strconv.FormatInt(time.Now().Unix(), 10) }

// simulatedAccount is the account that the simulator has, and that sign pushes to.
const simulatedAccount = "gh_0123456789ab"

// signedQuery returns a fresh query of WeChat's, signed.
func (c *config) signedQuery() url.Values {
	timestamp, nonce := unixNow(), rand.Text()
	return url.Values{"signature": {signature(c.token, timestamp, nonce)}, "timestamp": {timestamp}, "nonce": {nonce}}
}

// signedPush returns an event as WeChat pushes it: its query and its body.
func (c *config) signedPush(openID, event, eventKey, ticket string) (url.Values, []byte, error) {
	return c.signedBody(message{ToUserName: simulatedAccount, FromUserName: cdata(openID), CreateTime: unixNow(),
		MsgType: "event", Event: cdata(event), EventKey: cdata(eventKey), Ticket: cdata(ticket)})
}

// signedText returns a text message as WeChat pushes it: its query and its body.
func (c *config) signedText(openID, content string) (url.Values, []byte, error) {
	return c.signedBody(message{ToUserName: simulatedAccount, FromUserName: cdata(openID), CreateTime: unixNow(),
		MsgType: "text", Content: cdata(content), MsgID: strconv.FormatInt(mathrand.Int64(), 10)})
}

// signedBody returns a push's query and body, signed, and sealed if there is a key.
func (c *config) signedBody(push any) (url.Values, []byte, error) {
	body, err := xml.Marshal(push)
	query := c.signedQuery()
	if c.aesKey != nil {
		encrypt := c.aesKey.seal([]byte(rand.Text()[:16]), body, c.appID)
		query.Set("encrypt_type", "aes")
		query.Set("msg_signature", signature(c.token, query.Get("timestamp"), query.Get("nonce"), encrypt))
		body = fmt.Appendf(nil, "<xml><ToUserName>%s</ToUserName><Encrypt>%s</Encrypt></xml>",
			simulatedAccount, encrypt)
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
