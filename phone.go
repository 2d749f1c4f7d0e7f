package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// phone is the phone that has opened a link.
func (d *demo) phone(w http.ResponseWriter, r *http.Request) {
	event, text := r.PostFormValue("event"), r.PostFormValue("content")
	status, shown := http.StatusOK, ""
	opened, err := d.open(d.config.publicURL + r.URL.RequestURI())
	if err == nil && event+text != "" {
		shown, err = d.press(r.Context(), opened, r.PostFormValue("openid"), event, text)
	}
	switch {
	case err != nil:
		status, shown = http.StatusBadRequest, err.Error()
	case shown != "" && opened.asks == "auth":
		http.Redirect(w, r, shown, http.StatusSeeOther)
		return
	}
	if shown != "" && opened.asks != "code" {
		opened.asks = "" // there is nothing more to press
	}
	d.config.writePage(w, status, "static/demo/phone.html",
		"Site", d.config.site(), "Asks", opened.asks, "Reply", bubble(shown))
}

// chatLink matches a link of a message, after HTML escaping.
var chatLink = regexp.MustCompile(`&lt;a href=&#34;(https?://(?:[^&]|&amp;)+)&#34;&gt;([^&]*)&lt;/a&gt;`)

// bubble returns a message as a chat shows it: links are links, the rest is text.
func bubble(message string) markup {
	return markup(chatLink.ReplaceAllString(html.EscapeString(message), `<a href="$1">$2</a>`))
}

// showAccount shows the account's own QR code, which leads to the chat with it.
func (d *demo) showAccount(w http.ResponseWriter, r *http.Request) {
	picture, err := qrPNG(d.config.publicURL + "/demo/chat")
	if r.FormValue("username") != d.config.account || err != nil {
		http.NotFound(w, r)
		return
	}
	write(w, http.StatusOK, "image/png", picture) // with WeChat, a JPEG
}

// scan is the phone for curl: it scans the QR code of a live ticket, or sends its
// digits, as openid. event is that of a button on the phone's page.
func (d *demo) scan(w http.ResponseWriter, r *http.Request) {
	key := digest(r.FormValue("ticket"))
	ticket, err := d.tickets.look(r.Context(), key)
	if err != nil || ticket.Status == statusExpired {
		http.Error(w, "no such ticket, or it has expired", http.StatusNotFound)
		return
	}
	link, event := ticket.Shown, "scan"
	switch ticket.Flow {
	case flowAuth:
		link, event = newWeChat(&d.config, nil).loginURL(d.config.publicURL, key), "allow"
	case flowCode:
		link = d.config.publicURL + "/demo/chat"
	}
	var shown string
	opened, err := d.open(strings.TrimSuffix(link, "#wechat_redirect"))
	if err == nil {
		event = cmp.Or(r.FormValue("event"), event)
		shown, err = d.press(r.Context(), opened, r.FormValue("openid"), event, ticket.Shown)
	}
	if err == nil && ticket.Flow == flowAuth {
		var resp *http.Response
		back := d.server + strings.TrimPrefix(shown, d.config.publicURL)
		if resp, _, err = sendAsWeChat(r.Context(), d.client, http.MethodGet, back, nil); err == nil {
			shown = resp.Header.Get("Location")
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	write(w, http.StatusOK, plainText, []byte(shown+"\n"))
}

// A screen is what the phone shows once a link is opened.
type screen struct {
	asks               string // which buttons it has: scan, auth, or code (the chat)
	scene, ticket      string // scan
	back, scope, state string // auth: where it leads, and with what
}

// authorizePage matches the link of the authorize page: these parameters, in this order.
var authorizePage = regexp.MustCompile(`^/connect/oauth2/authorize\?appid=([^&]+)&redirect_uri=([^&]+)` +
	`&response_type=code&scope=(snsapi_base|snsapi_userinfo)&state=([0-9A-Za-z]{0,128})$`)

// open opens the link of a QR code, of the authorize page, or of the chat with the
// account.
func (d *demo) open(link string) (screen, error) {
	path := strings.TrimPrefix(link, d.config.publicURL+"/demo")
	if chat, _, _ := strings.Cut(path, "?"); chat == "/chat" {
		return screen{asks: "code"}, nil
	}
	if id, isQR := strings.CutPrefix(path, "/q/"); isQR {
		qr := d.granted(id)
		if qr.kind != "qr" || time.Now().After(qr.expires) {
			return screen{}, errors.New("二维码已过期 This QR code has expired")
		}
		return screen{asks: "scan", scene: qr.scope, ticket: qr.of}, nil
	}
	auth := authorizePage.FindStringSubmatch(path)
	switch {
	case auth == nil:
		return screen{}, errors.New("空白页 A blank page: parameters missing, malformed or in the wrong order")
	case auth[1] != d.config.appID:
		return screen{}, errors.New("10003 appid 错误")
	case !strings.HasPrefix(auth[2], url.QueryEscape(d.config.publicURL+"/")):
		return screen{}, errors.New("10003 redirect_uri 域名与后台配置不一致")
	}
	back, err := url.QueryUnescape(auth[2])
	return screen{asks: "auth", back: back, scope: auth[3], state: auth[4]}, err
}

// press does what WeChat does when somebody presses a button, which in the chat sends
// text unless it is to follow. It returns what the phone shows or, for the authorize
// page, the callback that it goes to.
func (d *demo) press(ctx context.Context, on screen, openID, event, text string) (string, error) {
	if openID == "" || len(openID) > 64 {
		return "", errors.New("openid: 1 to 64 bytes")
	}
	var query url.Values
	var push []byte
	var err error
	switch {
	case on.asks == "auth" && event == "decline":
		return on.back + "?code=authdeny&state=" + on.state, nil
	case on.asks == "auth":
		code := d.issue(rand.Text(), 5*time.Minute,
			grant{kind: "code", of: openID, scope: on.scope, virtual: event == "snapshot"})
		return on.back + "?code=" + code + "&state=" + on.state, nil
	case on.asks == "code" && event == "subscribe":
		query, push, err = d.config.signedPush(openID, "subscribe", "", "")
	case on.asks == "code":
		query, push, err = d.config.signedText(openID, text)
	case event == "scan":
		query, push, err = d.config.signedPush(openID, "SCAN", on.scene, on.ticket)
	case event == "subscribe":
		query, push, err = d.config.signedPush(openID, "subscribe", "qrscene_"+on.scene, on.ticket)
	default:
		return "没有关注，什么也没有发送。 Not followed; nothing was sent.", nil
	}
	if err != nil {
		return "", err
	}
	return d.deliver(ctx, query, push)
}

// deliver sends a push to the account's server, three times if it is not answered.
// It returns what the user sees.
func (d *demo) deliver(ctx context.Context, query url.Values, message []byte) (string, error) {
	target, status, body := d.server+"/wechat/message?"+query.Encode(), 0, []byte(nil)
	for try := 1; try <= 3 && status == 0; try++ {
		if resp, answer, _ := sendAsWeChat(ctx, d.client, http.MethodPost, target, message); resp != nil {
			status, body = resp.StatusCode, answer
		}
	}
	var reply struct {
		XMLName                                          xml.Name `xml:"xml"`
		Content, Encrypt, MsgSignature, TimeStamp, Nonce string
	}
	switch {
	case status == http.StatusOK && (len(body) == 0 || string(body) == "success"):
		return "（没有回复 no reply）", nil
	case status != http.StatusOK, decodeXML(body, &reply) != nil:
		return "", fmt.Errorf("该公众号提供的服务出现故障，请稍后再试 (status %d)", status)
	case d.config.aesKey == nil:
		return reply.Content, nil
	case !verify(reply.MsgSignature, d.config.token, reply.TimeStamp, reply.Nonce, reply.Encrypt):
		return "", errSignature
	}
	body, err := d.config.aesKey.open(reply.Encrypt, d.config.appID)
	if err == nil {
		err = decodeXML(body, &reply)
	}
	return reply.Content, err
}
